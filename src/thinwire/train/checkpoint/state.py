"""What a checkpoint keeps of a run: taken from it, written, and put back bit for bit.

Alike on all ranks are the model and the optimizer, of replicas that differ their average and the first one's; where ranks hold
parts of the model, alike on those with the same part. A rank's own are its random state, its synchroniser and, where replicas
differ, its model and optimizer. What is alike is put back by parameter name, whatever the parts of the ranks that wrote it.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.utils import _pytree

from thinwire.collectives.ledger import Ledger
from thinwire.compress.activations.differences import Differences
from thinwire.compress.sharded.api import ShardedCompression
from thinwire.errors import UserError
from thinwire.parallel.tensor_parts import Part
from thinwire.parallel.tensor_state import Block, copy_common
from thinwire.sync.base import Synchroniser
from thinwire.sync.joined import Mean, joined
from thinwire.train.checkpoint.files import Progress, one_line, part_files, rank_file, read_progress, sync
from thinwire.train.checkpoint.shards import Refit, Shards, both_parts, from_plain, to_plain


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is saved. model: this rank's part of it, number `part` of `num_parts`, under the names of the whole model. shards: of
    parameters that are split themselves. layout: of the ranks, in words. replicas: whether ranks with other parts see other
    tokens."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sync: Synchroniser
    ledger: Ledger
    rank: int
    part: int = 0
    num_parts: int = 1
    shards: Shards = field(default_factory=dict)
    exchange: ShardedCompression | None = None
    """Of shards, whose codes owe something."""
    layout: str = ""
    replicas: bool = False
    copies: Mapping[str, Differences] = field(default_factory=dict)
    """Of activations, at this rank's boundaries."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy on the CPU, which training does not change any more. alike: only on ranks that write it."""

    alike: dict[str, Any] | None
    own: dict[str, Any]


def snapshot(parts: Parts, *, alike: bool) -> Snapshot:
    """The state as it is now. Between steps, on every rank; no communication."""
    own: dict[str, Any] = {"sync": parts.sync.state_dict(), "random": torch.get_rng_state()}
    if (device := next(parts.model.parameters()).device).type != "cpu":
        own["device_random"] = torch.get_device_module(device).get_rng_state(device)
    if parts.num_parts > 1:
        own["part"], own["replicas"] = parts.part, parts.replicas
    if parts.exchange is not None:
        own["exchange"] = parts.exchange.state_dict()
    if parts.copies:
        own["copies"] = {name: one.state_dict() for name, one in parts.copies.items()}
    shards = {"shards": to_plain(parts.shards, parts.model.state_dict())} if parts.shards else {}
    own |= shards
    if parts.sync.replicas_differ:
        own["model"], own["optimizer"] = parts.model.state_dict(), parts.optimizer.state_dict()
    own = _copied(own)
    if not alike:
        return Snapshot(alike=None, own=own)
    with parts.sync.averaged():
        model, optimizer = get_state_dict(parts.model, parts.optimizer)
        return Snapshot(alike=_copied({"model": model, "optimizer": optimizer, **shards}), own=own)


def write_own(folder: Path, rank: int, taken: Snapshot) -> Path:
    """The file of one rank, on the disk when this returns."""
    path = folder / rank_file(rank)
    torch.save(taken.own, path)
    sync(path)
    return path


def write_alike(folder: Path, taken: Snapshot) -> None:
    """As `write_own`, where there is one part."""
    assert taken.alike is not None, "this rank has taken no copy of what is alike"
    dcp.save(taken.alike, checkpoint_id=folder, no_dist=True)  # syncs its files


def write_part(path: Path, taken: Snapshot) -> Path:
    """As `write_own`, what is alike on the ranks with the same part."""
    assert taken.alike is not None, "this rank has taken no copy of its part"
    torch.save(taken.alike, path)
    sync(path)
    return path


def load(path: Path, parts: Parts, *, with_own: bool) -> None:
    """Put a whole checkpoint into `parts`, before the first backward pass. On every rank; no communication.

    Its own parts may be others than this rank's: what this rank's model has is taken by name. UserError for what is not there.

    with_own: each rank goes on with its own file, as many ranks as wrote it. Without, what the files that are there say of the
    ranks' residuals is shared out anew (`Synchroniser.adopt`), and random states begin afresh; replicas that differed begin from
    their averaged parameters, with the first one's optimizer.
    """
    # With gradients there, torch would take the optimizer for initialised and load none of its state.
    assert all(parameter.grad is None for parameter in parts.model.parameters()), "load before the first backward pass"
    quiet()
    with one_line(f"checkpoint {path}", "read"):
        state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(parts.model, parts.optimizer), strict=True))
        groups = [dict(group) for group in state["optimizer"]["param_groups"]]  # of this rank's parameters; reading replaces them
        _read(path, state, parts.shards)
        parts.model.load_state_dict(state["model"])
        groups = [_hyperparameters(group, state["optimizer"]["param_groups"]) for group in groups]
        parts.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        if not with_own:
            owns = [torch.load(file, weights_only=True) for file in sorted(path.glob("rank-*.pt"))]
            if owns:
                parts.sync.adopt(_by_replica(owns, parts))
            if parts.copies and parts.rank == 0:
                print(f"checkpoint {path}: its copies of activations are of other ranks; samples come as new ones", flush=True)
            _adopt_owed([own["exchange"] for own in owns if "exchange" in own], path, parts)
            return
        own = torch.load(path / rank_file(parts.rank), weights_only=True)
        if "model" in own:
            parts.model.load_state_dict(own["model"])
            parts.optimizer.load_state_dict(own["optimizer"])
        parts.sync.load_state_dict(own["sync"])
        if parts.exchange is not None:
            parts.exchange.load_state_dict(own["exchange"])
        for name, state_of_copies in own.get("copies", {}).items() if parts.copies else ():
            parts.copies[name].load_state_dict(state_of_copies)
        torch.set_rng_state(own["random"])
        if "device_random" in own:
            device = next(parts.model.parameters()).device
            torch.get_device_module(device).set_rng_state(own["device_random"], device)


def load_weights(path: Path, model: torch.nn.Module) -> Progress:
    """Load the model alone from a whole checkpoint, without a process group. UserError if it is of another model."""
    progress = read_progress(path)
    state = {"model": model.state_dict()}
    quiet()
    with one_line(f"checkpoint {path}", "read"):
        _read(path, state)
    model.load_state_dict(state["model"])
    return progress


def quiet() -> None:
    """torch.distributed.checkpoint warns of each rank that reads or writes by itself, as is meant here. For the whole process,
    because threads have no warnings of their own."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def _read(path: Path, state: dict[str, Any], shards: Shards = {}) -> None:  # noqa: B006 (never changed)
    """Into the tensors of `state`, {"model"} or {"model", "optimizer"}, by names of parameters, of which this rank has `shards`.
    Of groups all that were saved."""
    files = part_files(read_progress(path).num_parts)
    if not files:
        _read_whole(path, state, shards)
        return
    moments, groups = state.get("optimizer", {}).get("state", {}), list[Any]()
    wanted: dict[str, set[Block]] = {name: set() for name in state["model"]}  # what is there of each
    for file in (path / name for name in files if wanted and (path / name).exists()):  # a disk need not hold all
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        groups += saved["optimizer"]["param_groups"]
        its = from_plain(saved)
        for name in wanted.keys() & saved["model"].keys():  # what several have is taken from the first
            both = both_parts(name, shards, its)
            wanted[name].update(_put(state["model"], saved["model"], [name], str(file), both))
            if name in moments:
                its_moments, what = saved["optimizer"]["state"].get(name, {}), f"{file}, optimizer, {name}:"
                _put(moments[name], its_moments, moments[name], what, both)
            there = (math.prod(map(len, block)) for block in wanted[name])
            if both is None or sum(there) == both[0].held(both[0].whole_shape(state["model"][name].shape)):
                del wanted[name]
    if wanted:
        raise UserError(f"checkpoint {path} holds no {next(iter(wanted))}; resume with the model that it was made with")
    if "optimizer" in state:
        state["optimizer"]["param_groups"] = groups


def _read_whole(path: Path, state: dict[str, Any], shards: Shards) -> None:
    """Of a checkpoint of whole parameters; those of which this rank has parts come one after the other, for they are larger."""
    if not shards:
        dcp.load(state, checkpoint_id=path, no_dist=True)
        return
    model, moments = state["model"], state["optimizer"]["state"]
    rest: dict[str, Any] = {"optimizer": {"param_groups": state["optimizer"]["param_groups"]}}
    for values, place in ((model, rest), (moments, rest["optimizer"])):
        if whole_here := {name: value for name, value in values.items() if name not in shards}:
            place["model" if values is model else "state"] = whole_here
    dcp.load(rest, checkpoint_id=path, no_dist=True)
    state["optimizer"]["param_groups"] = rest["optimizer"]["param_groups"]
    for name in model.keys() & shards.keys():
        part, its = shards[name], {"optimizer": {"state": {name: moments[name]}}} if name in moments else {}
        whole: dict[str, Any] = _pytree.tree_map_only(torch.Tensor, partial(_whole, part), {"model": {name: model[name]}, **its})
        dcp.load(whole, checkpoint_id=path, no_dist=True)
        both, what = (part, part.everything), f"checkpoint {path}"
        _put(model, whole["model"], [name], what, both)
        if name in moments:
            _put(moments[name], whole["optimizer"]["state"][name], moments[name], what, both)


def _whole(part: Part, local: torch.Tensor) -> torch.Tensor:
    """Room for the whole of a tensor; a number is whole."""
    return local.new_empty(part.whole_shape(local.shape)) if local.dim() else local


@torch.no_grad()
def _put(
    mine: dict[str, Any],
    saved: Mapping[str, Any],
    keys: Iterable[str],
    what: str,
    both: tuple[Part, Part] | None = None,
) -> list[Block]:
    """both: parts of a parameter, that of what is `mine` and that of what is saved. Returns what was there of the former."""
    there: list[Block] = []
    for key in list(keys):
        shape = getattr(mine[key], "shape", None)
        cut = both if shape else None  # a number is whole
        whole = cut[0].whole_shape(mine[key].shape) if cut else ()
        wanted = cut[1].local_shape(whole) if cut else shape
        alike = not cut or cut[1].whole_shape(cut[1].local_shape(whole)) == whole
        fits = key in saved and getattr(saved[key], "shape", None) == wanted and alike
        if not fits:
            of_shape = f" of shape {list(shape)}" if shape else ""
            raise UserError(f"{what} holds no {key}{of_shape}; resume with the model and the optimizer that it was made with")
        if cut:
            there = copy_common(mine[key], cut[0], saved[key], cut[1])
        elif isinstance(mine[key], torch.Tensor):
            mine[key].copy_(saved[key])
        else:
            mine[key] = saved[key]
    return there


def _adopt_owed(states: Sequence[dict[str, Any]], path: Path, parts: Parts) -> None:
    """Of the codes of gradients that are reduced to shards. Where nobody takes it on, that is said; nobody does what is of parts
    of tensor ranks."""
    owed = any(unit["owed"] is not None for one in states for unit in one["units"].values())
    splits = "tensor" in f"{read_progress(path).layout} {parts.layout}"
    if owed and parts.exchange is not None and not splits:
        parts.exchange.adopt(states)
    elif owed and parts.rank == 0:
        why = "it is of parts of tensor ranks" if splits else "nothing is sharded any more"
        print(f"checkpoint {path}: what the codes of sharded.gradients owe is left out, for {why}", flush=True)


def _hyperparameters(group: dict[str, Any], saved: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`group` with those of the saved group that its parameters were in; as it is, if it has no parameters."""
    its = next((one for one in saved if set(group["params"]) & set(one["params"])), group)
    return {**its, "params": group["params"]}


def _by_replica(owns: Sequence[Mapping[str, Any]], parts: Parts) -> list[dict[str, Any]]:
    """States of synchronisers by replica, its parts' put together, of the parameters of this rank."""
    if parts.num_parts == 1 and not any("part" in own for own in owns):
        return [own["sync"] for own in owns]
    by_part: dict[int, list[Mapping[str, Any]]] = {}
    for own in owns:
        by_part.setdefault(own.get("part", 0), []).append(own)
    found, shapes = [], {name: value.shape for name, value in parts.model.state_dict().items()}
    for row in zip_longest(*(by_part[part] for part in sorted(by_part))):
        held = {part: own for part, own in zip(sorted(by_part), row, strict=True) if own is not None}
        like = list(held).index(parts.part) if parts.part in held else 0
        replicas = any(own.get("replicas") for own in held.values())
        fit = Mean() if replicas else Refit(parts.shards, shapes, [from_plain(own) for own in held.values()])
        found.append(joined([own["sync"] for own in held.values()], shapes, like, fit))
    return found


def _copied(tree: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = _pytree.tree_map_only(torch.Tensor, lambda one: one.detach().to("cpu", copy=True), tree)
    return copied
