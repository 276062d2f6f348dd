"""States of synchronisers whose parameters are split over ranks: whatever parts wrote them, any others take them up."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compress.memory import Store
from thinwire.config.model import ModelConfig
from thinwire.models.transformer import Transformer
from thinwire.parallel.sharded import rows_of
from thinwire.parallel.tensor_parts import Part, parts_of
from thinwire.parallel.tensor_state import cut_out
from thinwire.parallel.tensor_state import put_together as joined_parts
from thinwire.sync.joined import joined
from thinwire.train.checkpoint.shards import Refit, from_plain, to_plain

CONFIG = ModelConfig.model_validate({"layers": 1, "width": 20, "heads": 5, "hidden": 9, "vocabulary": 11})
SHAPES = {name: tuple(value.shape) for name, value in Transformer(CONFIG).state_dict().items()}
Way = tuple[str, int]
WAYS = st.sampled_from([("tensor", 1), ("tensor", 2), ("tensor", 4), ("rows", 2), ("rows", 3), ("rows of 2 tensor ranks", 6)])


def parts(way: Way, rank: int) -> dict[str, Part]:
    if way[0] == "rows":
        return {name: rows_of(shape[0], way[1], rank) for name, shape in SHAPES.items()}
    if way[0] == "rows of 2 tensor ranks":
        its = parts_of(CONFIG, 2, rank % 2)
        local = {name: its[name].local_shape(shape) if name in its else shape for name, shape in SHAPES.items()}
        return {name: rows_of(shape[0], 3, rank // 2, its.get(name)) for name, shape in local.items()}
    return parts_of(CONFIG, way[1], rank) if way[1] > 1 else {}


def refit(way: Way, rank: int, written_by: Way) -> tuple[Refit, dict[str, tuple[int, ...]]]:
    mine = parts(way, rank)
    shapes = {name: mine[name].local_shape(shape) if name in mine else shape for name, shape in SHAPES.items()}
    return Refit(mine, shapes, [parts(written_by, number) for number in range(written_by[1])]), shapes


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cut(state: dict[str, torch.Tensor], way: Way) -> list[dict[str, torch.Tensor]]:
    """By rank."""
    held = [parts(way, rank) for rank in range(way[1])]
    return [{name: cut_out(value, its[name]) if name in its else value for name, value in state.items()} for its in held]


def put_together(states: list[dict[str, torch.Tensor]], way: Way) -> dict[str, torch.Tensor]:
    held = [parts(way, rank) for rank in range(way[1])]
    return {
        name: joined_parts([state[name] for state in states], [its[name] for its in held]) if name in held[0] else value
        for name, value in states[0].items()
    }


def coded_state(local: dict[str, torch.Tensor], storage: str) -> dict[str, Any]:
    """As an exchange saves it."""
    store = Store(storage)  # type: ignore[arg-type]
    for name, value in local.items():
        store.put(name, value.flatten())
    rights = {name: value[:, :2].T for name, value in local.items() if value.dim() == 2}
    memory = {"owed": store.state_dict(), "steps": dict.fromkeys(local, 3)}
    return {"kind": "int4", "step": 3, "memory": memory, "carried": [{"counts": dict.fromkeys(local, 3)}, {"rights": rights}]}


def residuals_of(state: dict[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    owed = state["memory"]["owed"]
    kept = Store(owed["storage"], owed["kept"], owed["numels"]).all()
    assert kept.keys() == shapes.keys()
    return {name: kept[name].view(*shape) for name, shape in shapes.items()}


@given(written_by=WAYS, read_by=WAYS, storage=st.sampled_from(["float32", "int8"]))
def test_residuals_are_conserved(written_by: Way, read_by: Way, storage: str) -> None:
    locals_ = cut(values(1), written_by)
    states = [coded_state(local, storage) for local in locals_]
    shapes_of = [{name: value.shape for name, value in local.items()} for local in locals_]
    stored = [residuals_of(*both) for both in zip(states, shapes_of, strict=True)]
    expected = put_together(stored, written_by)
    found = []
    for rank in range(read_by[1]):
        fit, shapes = refit(read_by, rank, written_by)
        state = joined(states, shapes, 0, fit)
        found.append(residuals_of(state, shapes))
        assert found[-1].keys() == state["memory"]["steps"].keys() == state["carried"][0]["counts"].keys()
        rights = state["carried"][1]["rights"]
        assert (set(rights) == set(states[0]["carried"][1]["rights"])) == (written_by == read_by)
        if written_by == read_by:
            assert state["memory"]["owed"]["storage"] == storage
            assert all(torch.equal(found[rank][name], stored[rank][name]) for name in stored[rank])
    again = put_together(found, read_by)
    assert again.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("with_momentum", [True, False])
@given(written_by=WAYS, read_by=WAYS)
def test_anchors_and_momenta_go_on(with_momentum: bool, written_by: Way, read_by: Way) -> None:
    anchors, momenta = values(2), values(3)

    def fragment(names: list[str], local: dict[str, torch.Tensor], pushed: dict[str, torch.Tensor]) -> dict[str, Any]:
        momentum = torch.cat([pushed[name].flatten() for name in names]) if with_momentum else torch.zeros(0)
        sizes = [local[name].numel() for name in names]
        anchor = torch.cat([local[name].flatten() for name in names])
        return {"names": names, "sizes": sizes, "anchor": anchor, "momentum": momentum, "sent_at": 4, "under_way": None}

    names = list(SHAPES)
    states = [
        {"fragments": [fragment(names[:3], *both), fragment(names[3:], *both)]}
        for both in zip(cut(anchors, written_by), cut(momenta, written_by), strict=True)
    ]
    found: dict[str, list[dict[str, torch.Tensor]]] = {"anchor": [], "momentum": []}
    for rank in range(read_by[1]):
        fit, shapes = refit(read_by, rank, written_by)
        held: dict[str, dict[str, torch.Tensor]] = {"anchor": {}, "momentum": {}}
        for one in joined(states, shapes, 0, fit)["fragments"]:
            assert one["sent_at"] == 4 and one["under_way"] is None
            for key in ("anchor", "momentum") if with_momentum else ("anchor",):
                for name, flat in zip(one["names"], one[key].split(one["sizes"]), strict=True):
                    if name not in held[key]:  # of several the first, as `adopt` does
                        held[key][name] = flat.view(shapes[name])
            assert with_momentum or not one["momentum"].numel()
        for key, its in held.items():
            found[key].append(its)
    assert all(torch.equal(value, anchors[name]) for name, value in put_together(found["anchor"], read_by).items())
    if with_momentum:
        assert all(torch.equal(value, momenta[name]) for name, value in put_together(found["momentum"], read_by).items())


@given(degree=st.sampled_from([2, 4]), rank=st.integers(0, 1))
def test_a_file_says_which_parts_it_holds(degree: int, rank: int) -> None:
    shards = parts_of(CONFIG, degree, rank)
    plain = to_plain(shards, SHAPES)
    assert from_plain({"shards": plain}) == shards and from_plain({}) == {}
    assert list(to_plain(shards, ["norm.weight", "embed.weight"])) == ["embed.weight"]


def test_what_one_rank_lacks_is_zero() -> None:
    """A residual that only one of two ranks has, such as one that the other has just sent whole."""
    residuals = values(5)
    states = [coded_state(local, "float32") for local in cut(residuals, ("tensor", 2))]
    for key in ("kept", "numels"):
        del states[1]["memory"]["owed"][key]["embed.weight"]
    fit, shapes = refit(("tensor", 1), 0, ("tensor", 2))
    kept = joined(states, shapes, 0, fit)["memory"]["owed"]["kept"]["embed.weight"].view(SHAPES["embed.weight"])
    assert torch.equal(kept[:6], residuals["embed.weight"][:6]) and not kept[6:].any()
