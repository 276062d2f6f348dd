"""Buffers of gradients averaged through codes: each parameter by the averager that sends the fewest bytes for it.

By default vectors (norms) and embeddings stay float32: they are few, and coarse codes hurt them most. Of the rest each
parameter goes to the cheapest of the averagers (`averager`) that take its shape; a plain all-reduce is always among them, so what
would grow by coding is not coded. Compression may begin after some steps that exchange plainly.

All of it runs on one thread in the order of the buffers, on a process group of its own, while the backward pass goes on.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.executor import Executor
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.private import private_copy
from thinwire.compress.averager import Averager, Piece, refuse_nccl
from thinwire.compress.memory import Memory
from thinwire.compress.plain import Plain
from thinwire.config.compress import Coded
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.workload import Parameter


class CodedExchange:
    """The exchange by the cheapest of `averagers`, or plainly; see `thinwire.compress.exchange.Exchange`."""

    def __init__(self, averagers: Sequence[Averager], memory: Memory, config: Coded, ledger: Ledger) -> None:
        self._averagers: list[Averager] = [*averagers, Plain(ledger)]
        self._memory, self._config, self._ledger = memory, config, ledger
        self.failure: Exception | None = None
        self._group: dist.ProcessGroup | None = None
        self._executor: Executor | None = None
        self._step = 0

    @property
    def settled_after(self) -> int:
        """Steps after which it sends what `transfers` says."""
        return self._config.after_steps + max(averager.settled_after for averager in self._averagers)

    def is_coded(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a parameter may be coded."""
        if len(shape) < 2 and not self._config.vectors:
            return False
        return not any(fnmatch(name, pattern) for pattern in self._config.exclude)

    def transfers(self, label: str, parameters: Sequence[Parameter], axis: str, world_size: int) -> list[Transfer]:
        """Those of each averager for its share of the bucket, in the order in which `start` sends them."""
        shares: list[list[Parameter]] = [[] for _ in self._averagers]
        for parameter in parameters:
            shares[self._cheapest(parameter.name, parameter.shape, world_size)].append(parameter)
        found = []
        for averager, share in zip(self._averagers, shares, strict=True):
            if share:
                found += averager.transfers(label, share, axis, world_size)
        return found

    def owed(self) -> dict[str, torch.Tensor]:
        """What this rank owes to the average, by parameter name, flat float32."""
        return self._memory.owed()

    def memory_bytes(self, parameters: Sequence[Parameter], world_size: int) -> int:
        """What error feedback holds on each rank."""
        plain = len(self._averagers) - 1
        coded = [one for one in parameters if self._cheapest(one.name, one.shape, world_size) != plain]
        return sum(self._memory.memory_bytes(parameter.numel) for parameter in coded)

    def attach(self, group: dist.ProcessGroup, axis: str) -> None:
        """Makes a process group and a thread. Collective over all ranks. UserError on CUDA."""
        refuse_nccl(group, self._config.kind)
        self._group = private_copy(group, f"{axis} exchange")
        self._ledger.axes[self._group.group_name] = axis
        for averager in self._averagers:
            averager.attach(self._group)
        self._executor = Executor("thinwire-exchange")

    def detach(self) -> None:
        """Waits for what is under way. Collective."""
        if self._executor is not None:
            self._executor.close()
        self._executor = None

    def start(
        self, buffer: torch.Tensor, pieces: Sequence[Piece], label: str, *, last: bool
    ) -> torch.futures.Future[torch.Tensor]:
        """Hands the buffer to the thread."""
        assert self._executor is not None and self._group is not None, "attach() comes first"
        shares: list[list[Piece]] = [[] for _ in self._averagers]
        for piece in pieces:
            route = self._cheapest(piece.name, piece.shape, self._group.size())
            shares[route if self._step >= self._config.after_steps else -1].append(piece)
        self._step += last
        return self._executor.submit(lambda: self._average(buffer, shares, label), self._fail)

    def state_dict(self) -> dict[str, Any]:
        """What this rank still owes to the average, and what its averagers carry."""
        carried = [averager.state_dict() for averager in self._averagers]
        return {"kind": self._config.kind, "step": self._step, "memory": self._memory.state_dict(), "carried": carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first step. UserError if another kind of exchange wrote it."""
        self._check([state])
        self._step = state["step"]
        self._memory.load_state_dict(state["memory"])
        for averager, carried in zip(self._averagers, state["carried"], strict=True):
            averager.load_state_dict(carried)

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Deals out anew what is owed to the average: 1/p sum_i e_i stays the same, so each new rank takes exactly that."""
        self._check(states)
        self._step = states[0]["step"]
        self._memory.adopt([state["memory"] for state in states])
        for index, averager in enumerate(self._averagers):
            averager.adopt([state["carried"][index] for state in states])

    def _check(self, states: Sequence[dict[str, Any]]) -> None:
        for state in states:
            if state.get("kind") != self._config.kind:
                raise UserError(
                    f"the checkpoint was made with compress.kind = {state.get('kind', 'none')!r}, not {self._config.kind!r}; "
                    "resume with the kind it was made with"
                )

    def _cheapest(self, name: str, shape: Sequence[int], world_size: int) -> int:
        """Index of the averager; at equal bytes the first one, so that plainly is the last resort."""
        if not self.is_coded(name, shape):
            return len(self._averagers) - 1
        sizes = [averager.sent_bytes(shape, world_size) for averager in self._averagers]
        return min((size, index) for index, size in enumerate(sizes) if size is not None)[1]

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error

    def _average(self, buffer: torch.Tensor, shares: Sequence[Sequence[Piece]], label: str) -> torch.Tensor:
        for averager, share in zip(self._averagers, shares, strict=True):
            if share:
                averager.average(buffer, share, label)
        return buffer
