"""Training that goes on after a failure, from what was committed last.

    @hvd.elastic.run
    def train(state):
        for state.epoch in range(state.epoch, epochs): ...; state.commit()

    train(hvd.elastic.TorchState(model, optimizer, epoch=0))

While all ranks live, a collective that fails (HorovodInternalError) takes every rank back to its last commit, in memory. When a
rank dies, torchrun --max-restarts starts all of them again; for that case each commit is also written to a file in the temporary
folder of each host, and read by the next life. The number of ranks stays: hosts are not discovered, and none are added.
"""

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from thinwire.adapters.horovod.context import CONTEXT
from thinwire.adapters.horovod.request import HorovodInternalError
from thinwire.environment import restart
from thinwire.files import written_aside
from thinwire.horovod.torch.functions import allgather_object, broadcast_object, broadcast_optimizer_state, broadcast_parameters


class State:
    """What training goes on from. Subclasses say how it is saved, restored and made the same on all ranks."""

    def __init__(self) -> None:
        self._reset_callbacks: list[Callable[[], None]] = []
        self.commits = 0
        """How often it was committed, in all lives."""

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], None]]) -> None:
        """Called after a failure, when Horovod is initialised again and before the state is made the same on all ranks."""
        self._reset_callbacks += callbacks

    def on_reset(self) -> None:
        """After a failure."""
        for callback in self._reset_callbacks:
            callback()

    def commit(self) -> None:
        """Keep it as it is now; training goes on from here after a failure."""
        self.save()
        self.commits += 1
        if (life := restart()) and CONTEXT.local_rank() == 0:
            path = _file(life.run)
            with written_aside(path) as aside:
                torch.save((self.commits, self.kept()), aside)

    def check_host_updates(self) -> None:
        """Nothing: hosts do not come and go."""

    def save(self) -> None:
        """Keep a copy in memory."""
        raise NotImplementedError

    def kept(self) -> Any:
        """The copy in memory, as a file may hold it."""
        raise NotImplementedError

    def keep(self, kept: Any) -> None:
        """The opposite of `kept`."""
        raise NotImplementedError

    def restore(self) -> None:
        """From the copy in memory."""
        raise NotImplementedError

    def sync(self) -> None:
        """Make it the same on all ranks, and keep that. Collective."""
        raise NotImplementedError


class TorchState(State):
    """`model` and `optimizer`, and anything else by name: other modules, optimizers, samplers, numbers, objects."""

    def __init__(self, model: torch.nn.Module | None = None, optimizer: Any = None, **others: Any) -> None:
        super().__init__()
        given = {"model": model, "optimizer": optimizer, **others}
        self._names = [name for name, value in given.items() if value is not None or name in others]
        for name, value in given.items():
            setattr(self, name, value)
        self._kept: dict[str, Any] = {}
        self.save()

    def save(self) -> None:
        values = {name: getattr(self, name) for name in self._names}
        self._kept = copy.deepcopy({name: one.state_dict() if _holds(one) else one for name, one in values.items()})

    def kept(self) -> Any:
        return self._kept

    def keep(self, kept: Any) -> None:
        self._kept = kept

    def restore(self) -> None:
        for name, kept in copy.deepcopy(self._kept).items():
            value = getattr(self, name)
            if _holds(value):
                value.load_state_dict(kept)
            else:
                setattr(self, name, kept)

    def sync(self) -> None:
        plain = {}
        for name in self._names:
            value = getattr(self, name)
            if isinstance(value, torch.nn.Module):
                broadcast_parameters(value.state_dict(), root_rank=0)
            elif isinstance(value, torch.optim.Optimizer):
                broadcast_optimizer_state(value, root_rank=0)
            elif isinstance(value, ElasticSampler):
                seen = allgather_object(value.state_dict())
                together = sorted({index for one in seen for index in one["processed_indices"]})
                value.load_state_dict(seen[0] | {"processed_indices": together})
            else:
                plain[name] = value
        for name, value in broadcast_object(plain).items():
            setattr(self, name, value)
        self.save()


class ElasticSampler(Sampler[int]):
    """Indices of `dataset`, shared out over the ranks; those that were recorded do not come again in an epoch.

    Each rank gets as many; if they do not come out even, some indices come twice.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        self._dataset, self._shuffle, self._seed = dataset, shuffle, seed
        self.epoch = 0
        self.processed_indices: set[int] = set()
        self.indices: list[int] = []
        """Of this rank, in the order of the latest iteration."""
        self.reset()

    @property
    def processed_num(self) -> int:
        """How many indices were recorded in this epoch, here or, after a `sync`, anywhere."""
        return len(self.processed_indices)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: nothing is recorded."""
        self.epoch, self.processed_indices = epoch, set()
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Batch number `batch_idx` of the latest iteration is done."""
        self.record_indices(self.indices[batch_idx * batch_size :][:batch_size])

    def record_indices(self, indices: Iterable[int]) -> None:
        """These are done."""
        self.processed_indices.update(indices)

    def reset(self) -> None:
        """Share out what is left of the epoch, over the ranks that there are now."""
        self._left = [index for index in range(len(self._dataset)) if index not in self.processed_indices]
        self._each = math.ceil(len(self._left) / CONTEXT.size())

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, and in which epoch."""
        return {"epoch": self.epoch, "processed_indices": sorted(self.processed_indices)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Share out what that state has left."""
        self.epoch, self.processed_indices = state["epoch"], set(state["processed_indices"])
        self.reset()

    def __iter__(self) -> Iterator[int]:
        left = self._left
        if self._shuffle:
            order = torch.randperm(len(left), generator=torch.Generator().manual_seed(self._seed + self.epoch))
            left = [left[at] for at in order.tolist()]
        ranks = CONTEXT.size()
        self.indices = (left * ranks)[: self._each * ranks][CONTEXT.rank() :: ranks]
        return iter(self.indices)

    def __len__(self) -> int:
        return self._each


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Around a function whose first argument is a State; see the top of the file. Collective.

    The error goes on to the caller if nothing was committed since the one before it, as then it would come again and again.
    """

    @functools.wraps(func)
    def again(state: State, *args: Any, **kwargs: Any) -> Any:
        _resume(state)
        failed_at = -1
        while True:
            state.sync()
            try:
                return func(state, *args, **kwargs)
            except HorovodInternalError:
                if state.commits == failed_at:
                    raise
                failed_at = state.commits
            state.restore()
            CONTEXT.shutdown()
            CONTEXT.init()
            state.on_reset()

    return again


def _resume(state: State) -> None:
    """In a later life: from the newest commit that a host has, which all ranks then hold."""
    life = restart()
    if life is None or not life.lives:
        return
    path = _file(life.run)
    commits, kept = torch.load(path, weights_only=False) if path.is_file() else (0, None)
    everyone = allgather_object(commits)
    newest = max(everyone)
    if newest:
        root = everyone.index(newest)
        state.keep(broadcast_object(kept, root))
        state.commits = newest
        state.restore()


def _holds(value: Any) -> bool:
    return isinstance(value, torch.nn.Module | torch.optim.Optimizer | ElasticSampler)


def _file(run: str) -> Path:
    return Path(tempfile.gettempdir()) / f"thinwire-elastic-{run}.pt"
