"""Checkpoints that survive whatever happens while they are written, and resume a run bit for bit.

A checkpoint is a folder `step-000120`: torch.distributed.checkpoint files for model and optimizer, one `rank-00000.pt` per rank
(random state, synchroniser, and where replicas differ what is the replica's own), `progress.json`, and `checksums.json` over all
of them. It is written aside as `.step-000120.tmp` and renamed when whole, so a name without a dot is complete; a damaged one is
found by its checksums and never loaded.
"""

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from thinwire.collectives.ledger import Ledger
from thinwire.errors import UserError
from thinwire.sync.base import Synchroniser
from thinwire.train.assign import Assignment
from thinwire.train.failure import symptom

_PROGRESS, _CHECKSUMS = "progress.json", "checksums.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: the next step to train, tokens seen, world size, micro-batches by replica."""

    step: int
    tokens: int
    world_size: int
    assignment: Assignment


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is saved. All methods below that take Parts are collective: every rank calls."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sync: Synchroniser
    ledger: Ledger
    rank: int


def save(folder: Path, parts: Parts, progress: Progress) -> Path:
    """Write a checkpoint below `folder` (on storage that all ranks see). Returns its path. UserError if it cannot be written."""
    final = folder / f"step-{progress.step:06d}"
    aside = folder / f".{final.name}.tmp"
    with parts.ledger.label("checkpoint"), _one_line(f"checkpoint {final}", "written"):
        if parts.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        mine = {"sync": parts.sync.state_dict(), "random": torch.get_rng_state()}
        if (device := next(parts.model.parameters()).device).type == "cuda":
            mine["device_random"] = torch.cuda.get_rng_state(device)
        if parts.sync.replicas_differ:
            mine["model"], mine["optimizer"] = parts.model.state_dict(), parts.optimizer.state_dict()
        with parts.sync.averaged():
            model, optimizer = get_state_dict(parts.model, parts.optimizer)
            # What ranks have alike is written by any of them; where replicas differ it must be one, or the file is a mixture.
            planner = DefaultSavePlanner(dedup_save_to_lowest_rank=parts.sync.replicas_differ)
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=aside, planner=planner)
        torch.save(mine, aside / _rank_file(parts.rank))
        dist.barrier()
        if parts.rank == 0:
            _finish(aside, final, progress)
        dist.barrier()
    return final


def load(path: Path, parts: Parts) -> Progress:
    """Load a checkpoint into `parts`, before the first backward pass. UserError on all ranks if it is damaged.

    With another number of ranks than it was written by, the ranks' residuals are shared out anew (`Synchroniser.adopt`), and
    random states begin afresh; replicas that differed begin from their averaged parameters, with the first one's optimizer.
    """
    # With gradients there, torch would take the optimizer for initialised and load none of its state.
    assert all(parameter.grad is None for parameter in parts.model.parameters()), "load before the first backward pass"
    progress = read_progress(path)
    verdict = [_verify(path) if parts.rank == 0 else None]
    with parts.ledger.label("checkpoint"), _one_line(f"checkpoint {path}", "read"):
        dist.broadcast_object_list(verdict, 0)
        if verdict[0]:
            raise UserError(verdict[0])
        model, optimizer = get_state_dict(parts.model, parts.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=path)
        set_state_dict(parts.model, parts.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if progress.world_size == dist.get_world_size():
            mine = torch.load(path / _rank_file(parts.rank), weights_only=True)
            if "model" in mine:
                parts.model.load_state_dict(mine["model"])
                parts.optimizer.load_state_dict(mine["optimizer"])
            parts.sync.load_state_dict(mine["sync"])
            torch.set_rng_state(mine["random"])
            if "device_random" in mine:
                torch.cuda.set_rng_state(mine["device_random"], next(parts.model.parameters()).device)
        else:
            everybody = [torch.load(path / _rank_file(rank), weights_only=True) for rank in range(progress.world_size)]
            parts.sync.adopt([theirs["sync"] for theirs in everybody])
    return progress


def load_weights(path: Path, model: torch.nn.Module) -> Progress:
    """Load the model alone, in one process without a process group. UserError if it is damaged, or of another model."""
    progress = read_progress(path)
    if damage := _verify(path):
        raise UserError(damage)
    state = {"model": model.state_dict()}
    with _one_line(f"checkpoint {path}", "read"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(state, checkpoint_id=path, no_dist=True)
    model.load_state_dict(state["model"])
    return progress


def latest(folder: Path) -> Path:
    """The newest whole checkpoint below `folder`. UserError if there is none."""
    found = sorted(folder.glob("step-*"))
    if not found:
        raise UserError(f"{folder} holds no checkpoint to resume from; start without --resume")
    return found[-1]


def read_progress(path: Path) -> Progress:
    """The content of a checkpoint's `progress.json`. UserError if it is not readable."""
    try:
        content = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
        assignment = content.pop("deal", None) or content["assignment"]  # older checkpoints say "deal"
        return Progress(**content | {"assignment": tuple(assignment)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(_damaged(path, f"{_PROGRESS} is not readable ({type(error).__name__})")) from None


def _finish(aside: Path, final: Path, progress: Progress) -> None:
    """Rank 0, when every rank has written: progress, checksums, rename."""
    missing = [name for rank in range(progress.world_size) if not (aside / (name := _rank_file(rank))).exists()]
    if missing:
        raise UserError(f"checkpoint {final}: {missing[0]} is missing; the run folder must lie on storage that all hosts share")
    (aside / _PROGRESS).write_text(json.dumps(progress.__dict__), encoding="utf-8")
    sums = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
    (aside / _CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    if final.exists():  # a resumed run saves the same step again: the old one stays until the new one is whole
        old = Path(tempfile.mkdtemp(prefix=".old-", dir=final.parent))
        final.rename(old / final.name)
        aside.rename(final)
        shutil.rmtree(old)
    else:
        aside.rename(final)


def _verify(path: Path) -> str | None:
    """None if every file has its checksum, else what is wrong."""
    try:
        sums: dict[str, str] = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _damaged(path, f"{_CHECKSUMS} is not readable")
    for name, expected in sums.items():
        file = path / name
        if not file.exists():
            return _damaged(path, f"{name} is missing")
        if _sha256(file) != expected:
            return _damaged(path, f"{name} ({file.stat().st_size} bytes) does not have its checksum")
    return None


def _damaged(path: Path, what: str) -> str:
    others = [other.name for other in sorted(path.parent.glob("step-*")) if other != path]
    then = f"remove it to resume from {others[-1]}" if others else "there is no other; start without --resume"
    return f"checkpoint {path} is damaged: {what}; {then}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


@contextmanager
def _one_line(what: str, done: str) -> Iterator[None]:
    """Errors of the disk become a UserError."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise UserError(f"{what} cannot be {done}: {error.strerror or error}; check the disk and its rights") from None
    except dcp.api.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if symptom(first):  # the disk is all right: another rank has gone
            raise first from None
        raise UserError(f"{what} cannot be {done}: {first}") from None
