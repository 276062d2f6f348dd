"""Lightning: a strategy. Its settings are the arguments, which LightningCLI reads from its own configuration too.

    trainer = Trainer(accelerator="cpu", strategy=ThinwireStrategy(compress="int4"))        # or sync="diloco", every=30

    trainer:
      strategy:
        class_path: thinwire.adapters.lightning.ThinwireStrategy
        init_args: {compress: int4}

Lightning's DDPStrategy drops a `ddp_comm_hook` on CPUs without a word; this one does not. On CPUs the process group is metered,
so that `strategy.door.ledger` says what is sent; for chosen collectives call `thinwire.init` before. What each rank owes is in a
folder beside each checkpoint, `NAME.ckpt.thinwire`, with the state of its random numbers, which Lightning does not keep.
"""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from thinwire.adapters.front_door import FrontDoor
from thinwire.collectives.start import init
from thinwire.environment import read_environment
from thinwire.errors import UserError


class ThinwireStrategy(DDPStrategy):
    """DDPStrategy whose gradients travel in codes, or whose replicas exchange rarely.

    sync, compress, and what a kind takes besides (`thinwire`, a table): as `FrontDoor` has them. options: DDPStrategy's own.
    UserError for settings that do not exist, a hook of one's own, and several optimizers with a rare sync.
    """

    def __init__(
        self,
        sync: str = "every_step",
        compress: str | dict[str, Any] | None = None,
        thinwire: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if options.get("ddp_comm_hook") is not None:
            raise UserError("lightning: ddp_comm_hook is thinwire's here; leave it out")
        super().__init__(**options)
        self.door = FrontDoor("lightning", sync, compress, **(thinwire or {}))
        self._loaded: Path | None = None
        self._random: torch.Tensor | None = None
        self._averaged: AbstractContextManager[None] | None = None

    def setup_distributed(self) -> None:
        """A metered group on CPUs, then what Lightning does."""
        if self.root_device.type == "cpu" and not dist.is_initialized():
            self.set_world_ranks()
            where: dict[str, Any] = {}
            if read_environment().place is None:  # Lightning has started the ranks
                assert self.cluster_environment is not None
                address = f"tcp://{self.cluster_environment.main_address}:{self.cluster_environment.main_port}"
                where = {"init_method": address, "rank": self.global_rank, "world_size": self.world_size}
            init(collectives="native", timeout=self._timeout, **where)
        super().setup_distributed()

    def configure_ddp(self) -> None:
        """Wrapped, unless each rank is a replica of its own."""
        if not self.door.rare:
            super().configure_ddp()

    def _register_ddp_hooks(self) -> None:
        """`setup` registers ours."""

    def setup(self, trainer: Trainer) -> None:
        """Model and optimizer are there now."""
        super().setup(trainer)
        if trainer.state.fn == "fit":
            if self.door.rare and len(self.optimizers) != 1:
                raise UserError(f"lightning: a rare sync wants one optimizer, and there are {len(self.optimizers)}")
            assert self.model is not None
            self.door.attach(self.model, self.optimizers[0] if self.optimizers else None)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The average, where replicas differ."""
        with self.door.averaged():
            state = super().lightning_module_state_dict()
            return {name: value.clone() for name, value in state.items()} if self.door.rare else state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """What each rank owes first, then Lightning's file."""
        self._random = torch.get_rng_state()
        self.door.save(_beside(filepath), random=self._random)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        """On every rank, since disks may be their own."""
        super().remove_checkpoint(filepath)
        shutil.rmtree(_beside(filepath), ignore_errors=True)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Remembers the path for `load_optimizer_state_dict`."""
        self._loaded = _beside(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Model and optimizer first, then what this rank owes."""
        super().load_optimizer_state_dict(checkpoint)
        assert self._loaded is not None, "load_checkpoint() comes first"
        self._random = self.door.load(self._loaded).get("random")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """After a checkpoint random numbers go on from its state, whether the run was interrupted or not: between the two
        Lightning draws some, as often as it makes iterators."""
        if self._random is not None:
            torch.set_rng_state(self._random)
            self._random = None
        super().on_train_batch_start(batch, batch_idx)

    def on_validation_start(self) -> None:
        """Validation sees the average."""
        self._averaged = self.door.averaged()
        self._averaged.__enter__()

    def on_validation_end(self) -> None:
        """Training goes on from where this replica is."""
        if self._averaged is not None:
            self._averaged.__exit__(None, None, None)
            self._averaged = None

    def on_train_end(self) -> None:
        """The last exchange."""
        super().on_train_end()
        self.door.finish()


def _beside(path: Any) -> Path:
    return Path(f"{path}.thinwire")
