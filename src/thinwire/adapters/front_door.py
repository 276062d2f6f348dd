"""What the front doors of other people's training loops have in common: `accelerate`, `transformers`, `lightning`.

A door hands over its settings, and later the model as its framework has wrapped it and the optimizer; here they go to the library
call that does the work:

    sync="every_step"    thinwire.compress_gradients where the framework has DistributedDataParallel, compress_sharded where FSDP2
    sync="diloco", ...   thinwire.DiLoCo; the framework must leave the model unwrapped (`rare`)

What a rank owes (residuals of codes, outer momentum, and between rare exchanges its own model and optimizer) goes into a file of
its own beside the framework's checkpoint, from which this rank goes on bit for bit.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from thinwire.collectives.backend import ledger_of
from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import Exchange
from thinwire.compress.sharded.api import ShardedCompression, compress_sharded
from thinwire.config.compress import read_coding
from thinwire.errors import UserError
from thinwire.files import written_aside
from thinwire.sync.hook import compress_gradients
from thinwire.sync.standalone import KINDS, DiLoCo
from thinwire.tomlfile import validate

EVERY_STEP = "every_step"


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` (FSDP2) was called on any of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


class FrontDoor:
    """One per rank. All methods but `averaged` and `save` are collective: every rank calls them at the same place.

    where: the door's name, for messages. sync: "every_step", or a kind of `thinwire.DiLoCo`. compress: "none", "int4", ..., or a
    table as in the section [compress] of run.toml; None: what the kind has by itself. options: of the kind (every,
    outer_learning_rate, ...); of `compress_sharded` where the framework has FSDP2.

    UserError for a kind, a codec or an option that does not exist.
    """

    def __init__(
        self, where: str, sync: str = EVERY_STEP, compress: str | Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        if sync != EVERY_STEP and sync not in KINDS:
            raise UserError(f"{where}: sync = {sync!r} does not exist; there are {EVERY_STEP}, {', '.join(KINDS)}")
        if compress is not None:
            read_coding(compress, f"{where}: compress")
        self.rare = sync != EVERY_STEP
        """Whether replicas go alone between exchanges; the model must not be wrapped then."""
        if self.rare:
            validate(KINDS[sync], options, where)
        self._where, self._sync, self._compress, self._options = where, sync, compress, options
        self._work: Exchange | ShardedCompression | DiLoCo | None = None
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._finished = False

    @property
    def ledger(self) -> Ledger:
        """What this rank has sent: between replicas that exchange rarely, else on the group that `thinwire.init` has made.

        UserError where every step exchanges on a group that is not ours.
        """
        if isinstance(self._work, DiLoCo):
            return self._work.ledger
        if (found := ledger_of(dist.group.WORLD)) is None:
            raise UserError(f"{self._where}: nobody counts here; call thinwire.init() before the framework makes a group")
        return found

    @property
    def work(self) -> Exchange | ShardedCompression | DiLoCo | None:
        """What `attach` has put in place; None before, and where nothing is coded."""
        return self._work

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Before the first forward pass. model: as the framework trains it. Nothing for a wrapped model that was attached before.

        UserError without a process group, and for a model that is wrapped in another way than `sync` needs.
        """
        if not dist.is_initialized():
            raise UserError(f"{self._where}: there is no process group; start the ranks with torchrun, or call thinwire.init()")
        if model is self._model and not self.rare:
            return
        coding = {"kind": self._compress} if isinstance(self._compress, str) else dict(self._compress or {"kind": "none"})
        sharded = is_sharded(model)
        if self.rare:
            if isinstance(model, DistributedDataParallel) or sharded or optimizer is None:
                raise UserError(
                    f"{self._where}: sync = {self._sync!r} wants a model that is on each rank whole, and an optimizer; "
                    "for replicas of several ranks use thinwire.DiLoCo in a loop of your own"
                )
            self._work = DiLoCo(model, optimizer, kind=self._sync, compress=self._compress, **self._options)
            self._work.__enter__()
        elif sharded:
            kind = coding.pop("kind")
            self._work = compress_sharded(
                model, "float32" if kind == "none" else kind, ledger=ledger_of(dist.group.WORLD), **coding, **self._options
            )
        elif isinstance(model, DistributedDataParallel):
            if self._options:
                name, value = next(iter(self._options.items()))
                raise UserError(f"{self._where}: {name} = {value!r} has no effect with sync = {EVERY_STEP!r}; leave it out")
            self._work = None if coding["kind"] == "none" else compress_gradients(model, optimizer=optimizer, **coding)
        else:
            raise UserError(f"{self._where}: the model is wrapped in {type(model).__name__}, neither DDP nor FSDP2 (fully_shard)")
        self._model, self._optimizer, self._finished = model, optimizer, False

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds the parameters that count, the same on all ranks; for evaluation. Local."""
        return self._work.averaged() if isinstance(self._work, DiLoCo) and not self._finished else nullcontext()

    def finish(self) -> None:
        """After the last step: the last exchange of rare ones; all ranks then hold the same model. A second call does nothing."""
        if isinstance(self._work, DiLoCo) and not self._finished:
            self._work.__exit__(None, None, None)
        self._finished = True

    def save(self, folder: Path, **more: torch.Tensor) -> None:
        """Write this rank's file into `folder`, which is made, with `more` of the door's own. Between steps, on every rank."""
        if self._work is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {"sync": self._sync, "ranks": dist.get_world_size(), "state": self._work.state_dict()} | more
        if self.rare:
            assert self._model is not None and self._optimizer is not None, "attach() comes first"
            content |= {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        with written_aside(self.file(folder)) as aside:
            torch.save(content, aside)

    def load(self, folder: Path) -> dict[str, Any]:
        """Go on from what `save` wrote, after the framework has loaded its own and before the first step. Returns the content.

        UserError on all ranks that lack their file, or have one of other settings.
        """
        if self._work is None:
            return {}
        path = self.file(folder)
        if not path.exists():
            raise UserError(
                f"{path}: there is no such file, and what rank {dist.get_rank()} of {dist.get_world_size()} owes would be lost; "
                "go on from a checkpoint that was made by as many ranks with these settings, and was finished"
            )
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content["sync"] != self._sync:
            raise UserError(f"{path} is of sync = {content['sync']!r}, and this run has {self._sync!r}; resume with the same")
        if isinstance(self._work, DiLoCo):
            assert self._model is not None and self._optimizer is not None, "attach() comes first"
            self._work.__exit__(InterruptedError, InterruptedError(), None)  # nothing is sent
            self._model.load_state_dict(content["model"])
            self._optimizer.load_state_dict(content["optimizer"])
            self._work.load_state_dict(content["state"])
            self._work.__enter__()
        else:
            self._work.load_state_dict(content["state"])
        return content

    def file(self, folder: Path) -> Path:
        """This rank's in a checkpoint."""
        return folder / f"thinwire-{dist.get_rank()}-of-{dist.get_world_size()}.pt"
