"""Whether ranks fit where they are to train, and what they could do about it: `memory.need` beside what is free."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from thinwire.config.model import ModelConfig
from thinwire.config.optimizer import state_of
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.measure.memory import Room
from thinwire.plan.memory import Need, need
from thinwire.tomlfile import put, validate
from thinwire.units import show

TOLERANCE = 1.25
"""A prediction may be off by so much either way; what is refused would not fit even then."""


def changed(config: RunConfig, changes: Mapping[str, Any], where: str) -> RunConfig:
    """With other values of keys such as "train.steps". UserError, which names `where`, for what does not fit."""
    content = config.model_dump()
    for key, value in changes.items():
        put(content, key, value, where)
    return validate(RunConfig, content, where)


def leaner(config: RunConfig, shape: ModelConfig, layout: Layout, *, casts: bool, on_device: bool = False) -> dict[str, Need]:
    """What a rank would need with other settings, by what they are, those first that cost least time. As for `memory.need`."""
    found = {}
    for changes, other in _others(config, layout, on_device=on_device):
        named = ", ".join(f"{name} = {value!r}" for name, value in changes.items())
        try:
            found[named] = need(changed(config, changes, named), shape, other, casts=casts, on_device=on_device)
        except UserError:
            continue
    return found


def _others(config: RunConfig, layout: Layout, *, on_device: bool) -> Iterator[tuple[dict[str, Any], Layout]]:
    """Settings by name, and the layout with them."""
    train, kinds = config.train, ("none", "selective", "full")
    recompute = kinds[kinds.index(train.recompute) + 1 :] if isinstance(train.recompute, str) else kinds[-1:]
    eight_bit = {"train.optimizer.states": "8bit"} if state_of(train.optimizer) == "adamw" else {}
    if train.updates == "together" and layout.data == 1:
        yield {"train.updates": "early"}, layout
    yield from (({"train.recompute": kind}, layout) for kind in recompute[:1])
    if eight_bit:
        yield eight_bit, layout
    yield from (({"train.recompute": kind}, layout) for kind in recompute[1:])
    if eight_bit and recompute:
        yield eight_bit | {"train.recompute": recompute[-1]}, layout
    degrees = (degree for degree in range(2, layout.data + 1) if layout.data % degree == 0)
    for degree in degrees if not config.sync.rare else ():
        shard = layout.shard * degree
        other = replace(layout, data=layout.data // degree, shard=shard)
        yield {"layout.shard": shard, "layout.data": other.data}, other
    for names in (["optimizer"], ["activations"], ["optimizer", "activations"]) if on_device and not train.on_host else ():
        yield {"train.on_host": names}, layout


def check(need: Need, rooms: Sequence[Room], leaner: Mapping[str, Need] = {}) -> None:
    """UserError if ranks cannot fit where they are to train. leaner: as that function returns them."""
    for room in rooms:
        wanted = need.host_bytes(room.ranks)
        if wanted > TOLERANCE * room.free_bytes:
            fits = (name for name, one in leaner.items() if all(one.host_bytes(each.ranks) <= each.free_bytes for each in rooms))
            name = next(fits, "")
            advice = f"{name}, with which they need {show(leaner[name].host_bytes(room.ranks), 'B')}, " if name else ""
            raise UserError(
                f"memory: {room.ranks} rank{'s' * (room.ranks > 1)} on {room.name} would need about {show(wanted, 'B')} (each "
                f"{need.terms()}), and {show(room.free_bytes, 'B')} are free there; take {advice}a smaller "
                "model.preset, train.micro_batch or train.sequence, or fewer ranks there"
            )


def line(need: Need, rooms: Sequence[Room]) -> str:
    """What a rank needs, beside what there is for it in the tightest room."""
    again = f"; computed again: {need.recomputed}" if need.recomputed else ""
    about = f"memory: a rank needs about {show(need.rank_bytes, 'B')} beside the program ({need.terms()}){again}"
    if not rooms:
        return f"{about}; what is free is not known here"
    tight = max(rooms, key=lambda room: need.host_bytes(room.ranks) / max(1.0, room.free_bytes))
    return f"{about}; {tight.name} has {show(tight.free_bytes, 'B')} free for {tight.ranks} rank{'s' * (tight.ranks > 1)}"
