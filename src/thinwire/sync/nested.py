"""Replicas that go alone between exchanges: what all such methods have in common (`local_steps`, `noloco`).

A replica may itself be several ranks, which another synchroniser (`inner`) holds together on other axes; under FSDP2 all of this
is done to shards (`shards`). Only what is trained is kept and sent; frozen parameters are equal everywhere.

Anchors, momenta and averages are float32, and float64 of parameters in float64, however parameters are stored; of complex
numbers they hold the parts. The model gets x rounded once, R(x), and the anchor keeps the digits of x. So a replica that goes on
from x stands not at x_m, what its model holds, but at

    x_m + (x - R(x))

which is x as long as nothing was trained: then nothing moves, and roundings do not add up from period to period. For float32 and
float64 it is x_m. Parameters of the two wide dtypes lie in flat buffers of their own, which are sent one behind the other.

All of it is done on the device of the parameters, and nothing waits for a device but what reads a state. With `outer_device =
"host"` anchors and momenta lie in memory of the host between exchanges (`host_memory`).

What a method carries, such as its outer momentum, belongs to the object, not to one stay in it. Entered again it goes on with it,
and from the model as it is now, or, left by an exception, from where it was. A state that was loaded is used once, when it is
entered next.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece
from thinwire.compress.stages import launched
from thinwire.errors import UserError
from thinwire.sync.base import Synchroniser
from thinwire.sync.host_memory import HostMemory
from thinwire.sync.shards import Shards
from thinwire.workload import Parameter


class Anchor:
    """Where a period began, for `parameters` of one wide dtype, of what this rank holds of them, and their outer momentum.

    values: flat, of that dtype, as is momentum (empty without one). pieces: where each parameter lies in them. host: where they
    lie outside of `held`; None: with the parameters.
    """

    def __init__(
        self, shards: Shards, parameters: Sequence[Parameter], with_momentum: bool = True, host: HostMemory | None = None
    ) -> None:
        self.suffix = suffix(parameters[0].dtype)
        self.dtype: torch.dtype = getattr(torch, parameters[0].dtype)
        self.pieces: list[Piece] = []
        first = 0
        for parameter in parameters:
            self.pieces.append(Piece(parameter.name, first, parameter.shape))
            first += parameter.numel
        self.values = self._flat(shards)
        self.momentum = torch.zeros_like(self.values if with_momentum else self.values[:0])
        self._host, self._fetched, self._is_held = host, list[torch.Tensor](), False
        if host is not None:
            self.values, self.momentum = host.taken(self.values), host.taken(self.momentum)

    def fetch(self) -> None:
        """Begin to bring values and momentum to the parameters, if they are elsewhere; `held` comes soon."""
        if self._host is not None and not self._fetched:
            self._fetched = [self._host.fetched(kept) for kept in (self.values, self.momentum)]

    @contextmanager
    def held(self, *, changes: bool) -> Iterator[None]:
        """Inside, values and momentum are where the parameters are. changes: what becomes of them there counts afterwards."""
        host = self._host
        if host is None or self._is_held:
            yield
            return
        self.fetch()
        host.arrive()
        kept = self.values, self.momentum
        (self.values, self.momentum), self._fetched, self._is_held = self._fetched, [], True
        try:
            yield
        finally:
            for values, home in zip((self.values, self.momentum), kept, strict=True) if changes else ():
                host.store(values, home)
            (self.values, self.momentum), self._is_held = kept, False

    def settle(self) -> None:
        """The host may read and write values and momentum where they lie, which nothing has fetched."""
        self._fetched = []
        if self._host is not None:
            self._host.settle()

    def reached(self, shards: Shards) -> torch.Tensor:
        """[numel] where the replica stands now: x_m + (x - R(x))."""
        flat = self._flat(shards)
        for piece in self.pieces:
            if (stored := shards[piece.name].dtype) != self.dtype:
                exact = piece.of(self.values)
                piece.of(flat).add_(exact - exact.to(stored))
        return flat

    def by_name(self) -> dict[str, torch.Tensor]:
        """The values of each parameter, flat."""
        return {piece.name: piece.of(self.values) for piece in self.pieces}

    def take_momentum(self, before: "Anchor") -> None:
        """Of parameters that were in `before`."""
        self.settle()
        before.settle()
        known = {piece.name: piece for piece in before.pieces}
        for piece in self.pieces:
            if piece.name in known and known[piece.name].shape == piece.shape and len(self.momentum):
                piece.of(self.momentum).copy_(known[piece.name].of(before.momentum))

    def _flat(self, shards: Shards) -> torch.Tensor:
        """A copy of what the model holds now."""
        return torch.cat([shards[piece.name].reshape(-1).to(self.dtype) for piece in self.pieces])


def suffix(dtype: str) -> str:
    """Of labels, so that what is sent in either wide dtype has one of its own."""
    return "" if dtype == "float32" else f" {dtype}"


def counted(buffers: Iterable[torch.Tensor]) -> str:
    """How many values there are, of which dtypes: "300 values (float32), 20 values (float64)"."""
    sizes = Counter[str]()
    for buffer in buffers:
        sizes[str(buffer.dtype).removeprefix("torch.")] += buffer.numel()
    return ", ".join(f"{numel} values ({dtype})" for dtype, numel in sizes.items()) or "0 values"


class NestedSynchroniser(Synchroniser):
    """Replicas lie along `axis`, `inner` holds together what is one replica; the steps of both are the same."""

    replicas_differ = True

    def __init__(self, axis: str, ledger: Ledger, inner: Synchroniser, *, on_host: bool = False) -> None:
        """on_host: anchors and momenta lie in memory of the host."""
        super().__init__(inner.num_micro)
        self._on_host = on_host
        self.inner, self._axis, self._ledger = inner, axis, ledger
        self._shards = Shards(nn.Module())
        self._held: dict[str, tuple[int, ...]] = {}
        """Shapes of what is exchanged, by name."""
        self._restored: dict[str, Any] | None = None
        self._adopted = False
        self._finished = True
        self._done = 0

    @property
    def ready_at(self) -> Any:
        return self.inner.ready_at

    @property
    def settled_after(self) -> int:
        return self.inner.settled_after

    def rehearsal(self) -> AbstractContextManager[None]:
        return self.inner.rehearsal()

    def microbatch(self, last: bool) -> AbstractContextManager[None]:
        return self.inner.microbatch(last)

    @contextmanager
    def attached(self, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[nn.Module]:
        """Begins from the model's parameters, unless there are others to go on from. Collective over all ranks.

        UserError if an exception ended the last stay and what is trained is not what it was then.
        """
        with self.inner.attached(model, optimizer, mesh) as module:
            self._shards = Shards(model)
            trained = {name: tuple(self._shards[name].shape) for name in self._shards.trained()}
            if self._restored is not None or self._finished:
                self._held = trained
                self._begin()
            elif trained != self._held:
                raise UserError(
                    "the model's trained parameters are others than when an exception ended the last exchange; load a "
                    "checkpoint, or begin anew with another object"
                )
            if self._restored is not None:
                with torch.no_grad():
                    self._restore(self._restored)
                if self._adopted:
                    self._write()
                self._restored, self._adopted = None, False
            self._connect(mesh.get_group(self._axis))
            self._finished = False
            try:
                yield module
            finally:
                self._disconnect()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds what `_write` writes. Local."""
        own = {name: values.clone() for name, values in self._shards.items()}
        self._write()
        try:
            yield
        finally:
            self._shards.write(own)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before `attached`."""
        self.inner.load_state_dict(state["inner"])
        self._restored, self._adopted = state, False

    def _host_memory(self) -> HostMemory | None:
        """If anchors are to lie elsewhere than the parameters."""
        device = self._shards.device
        return HostMemory(device) if self._on_host and launched(device) else None

    def _check_trained(self) -> None:
        """UserError if parameters were frozen, or are trained that nobody would send."""
        trained = set(self._shards.trained())
        changed = [name for name in self._shards if (name in trained) != (name in self._held)]
        if changed:
            raise UserError(
                f"{changed[0]} was frozen, or is trained, since the replicas' exchange began, and {len(changed) - 1} others; "
                "leave the block, change requires_grad on all ranks, and enter it again"
            )

    @abstractmethod
    def _begin(self) -> None:
        """Begin from `_shards`, with the momentum of parameters that were held before."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Go on with a state. UserError if it does not fit what is held."""

    @abstractmethod
    def _write(self) -> None:
        """Into the model: the parameters that count."""

    @abstractmethod
    def _connect(self, group: ProcessGroup) -> None:
        """Exchange with the ranks of `group` from now on. Collective."""

    @abstractmethod
    def _disconnect(self) -> None:
        """At the end of a stay."""
