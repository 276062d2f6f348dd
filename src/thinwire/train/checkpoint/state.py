"""What a checkpoint keeps of a run: taken from it, written, and put back bit for bit.

Alike on all ranks are the model and the optimizer, of replicas that differ their average and the first one's. A rank's own are
its random state, its synchroniser and, where replicas differ, its model and optimizer.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils import _pytree

from thinwire.collectives.ledger import Ledger
from thinwire.sync.base import Synchroniser
from thinwire.train.checkpoint.files import Progress, one_line, rank_file, read_progress, sync


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is saved."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sync: Synchroniser
    ledger: Ledger
    rank: int


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
    if parts.sync.replicas_differ:
        own["model"], own["optimizer"] = parts.model.state_dict(), parts.optimizer.state_dict()
    own = _copied(own)
    if not alike:
        return Snapshot(alike=None, own=own)
    with parts.sync.averaged():
        model, optimizer = get_state_dict(parts.model, parts.optimizer)
        return Snapshot(alike=_copied({"model": model, "optimizer": optimizer}), own=own)


def write_own(folder: Path, rank: int, taken: Snapshot) -> Path:
    """The file of one rank, on the disk when this returns."""
    path = folder / rank_file(rank)
    torch.save(taken.own, path)
    sync(path)
    return path


def write_alike(folder: Path, taken: Snapshot) -> None:
    """As `write_own`."""
    assert taken.alike is not None, "this rank has taken no copy of what is alike"
    dcp.save(taken.alike, checkpoint_id=folder, no_dist=True)  # syncs its files


def load(path: Path, parts: Parts, *, with_own: bool) -> None:
    """Put a whole checkpoint into `parts`, before the first backward pass. On every rank; no communication.

    with_own: each rank goes on with its own file, as many ranks as wrote it. Without, what the files that are there say of the
    ranks' residuals is shared out anew (`Synchroniser.adopt`), and random states begin afresh; replicas that differed begin from
    their averaged parameters, with the first one's optimizer.
    """
    # With gradients there, torch would take the optimizer for initialised and load none of its state.
    assert all(parameter.grad is None for parameter in parts.model.parameters()), "load before the first backward pass"
    quiet()
    with one_line(f"checkpoint {path}", "read"):
        model, optimizer = get_state_dict(parts.model, parts.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=path, no_dist=True)
        set_state_dict(parts.model, parts.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if not with_own:
            parts.sync.adopt([torch.load(file, weights_only=True)["sync"] for file in sorted(path.glob("rank-*.pt"))])
            return
        own = torch.load(path / rank_file(parts.rank), weights_only=True)
        if "model" in own:
            parts.model.load_state_dict(own["model"])
            parts.optimizer.load_state_dict(own["optimizer"])
        parts.sync.load_state_dict(own["sync"])
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
        dcp.load(state, checkpoint_id=path, no_dist=True)
    model.load_state_dict(state["model"])
    return progress


def quiet() -> None:
    """torch.distributed.checkpoint warns of each rank that reads or writes by itself, as is meant here. For the whole process,
    because threads have no warnings of their own."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def _copied(tree: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = _pytree.tree_map_only(torch.Tensor, lambda one: one.detach().to("cpu", copy=True), tree)
    return copied
