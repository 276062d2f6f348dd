"""Deep gradient compression: the largest of what has gathered, with the momentum corrected for what waits.

With plain error feedback behind an optimizer with momentum, a value that waited t steps enters the momentum once and late. DGC
keeps the momentum on the rank instead, before the choice, for each parameter:

    u <- m u + g          the momentum, m = 0.9
    v <- v + u            what should be sent
    sent: the largest of v (`largest`), gathered from all ranks (`gather`), their mean is the result
    v <- v - what arrived of it        where something was sent: the rounding of its bfloat16; elsewhere v stays
    u <- 0                             where something was sent (momentum factor masking), else it pushes on in a stale direction

so 1/p sum_i v_i (after) = 1/p sum_i (v_i + u_i) - result. What is not coded (vectors, what is excluded, all on one rank or before
`after_steps` are over) is treated alike, without a choice: u <- m u + g, the result is the mean of u + v, v <- 0, and u is not
masked. The optimizer must have no momentum of its own (plain SGD), for then the step of what is not coded is that of SGD with
momentum m; behind AdamW gradients are smoothed twice. Masking makes coded values move less than SGD with momentum would, 0.8 of
that where every value is sent in one step of a hundred; that is as published.

Warm-up, T steps each, after which the traffic is settled:

    25 %, 6.25 %, 1.56 %, 0.39 %, ..., as long as that is more than the fraction asked for

With 6 bytes a value and p - 1 receivers, 25 % cost more than a plain all-reduce where p > 5: so warm-up pays on small groups, and
there is none by default. The paper clips the local gradient by its norm over the whole model, which is not known when the first
bucket leaves; that is left out. u and v are float32 or block int8. When the number of ranks changes, every new rank takes their
means.

Lin et al. 2018 (Deep Gradient Compression).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Counting
from thinwire.compress.base import TensorCodec
from thinwire.compress.codecs.largest import GlobalTopK
from thinwire.compress.gather import Gather
from thinwire.compress.memory import Memory, Storage, Store
from thinwire.compress.precision import Rest, widened
from thinwire.errors import UserError

FIRST_FRACTION, STAGE_FACTOR = 0.25, 0.25


class MomentumCorrection(Memory):
    """u and v of each parameter; see the top of the file. v is the residual."""

    keeps = True

    def __init__(self, momentum: float = 0.9, storage: Storage = "float32") -> None:
        self._momentum = momentum
        self._speeds, self._sums = Store(storage), Store(storage)
        self._wanted: dict[str, tuple[Tensor, Tensor]] = {}
        self._rest = Rest()

    def stage(self) -> None:
        self._speeds.staged, self._sums.staged = {}, {}

    def commit(self, unless: Tensor | None = None) -> None:
        self._speeds.commit(unless)
        self._sums.commit(unless)

    def rollback(self) -> None:
        self._speeds.rollback()
        self._sums.rollback()

    def forget(self, name: str, where: Tensor) -> None:
        self._speeds.forgotten[name] = self._sums.forgotten[name] = where

    def to(self, device: torch.device) -> None:
        self._speeds.to(device)
        self._sums.to(device)

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """v, with this step's u."""
        narrow = self._rest.narrowed(name, self.exact(name, gradient))
        self._wanted[name] = self._wanted[name][0], narrow
        return narrow

    def exact(self, name: str, gradient: Tensor) -> Tensor:
        """v, with this step's u."""
        before, waiting, gradient = self._speeds.get(name), self._sums.get(name), widened(gradient)
        speed = gradient.clone() if before is None else gradient.add(before, alpha=self._momentum)
        wanted = speed.clone() if waiting is None else speed + waiting
        self._wanted[name] = speed, wanted
        return wanted

    def keep(self, name: str, error: Tensor) -> None:
        """v is what did not arrive; u is zero where that is not all of it."""
        speed, wanted = self._wanted.pop(name)
        self._speeds.put(name, speed.masked_fill_(error != wanted, 0.0))
        self._sums.put(name, self._rest.with_rest(name, error))

    def clear(self, name: str) -> None:
        """u goes on, as SGD's does."""
        self._speeds.put(name, self._wanted.pop(name)[0])
        self._sums.drop(name)

    def residuals(self) -> dict[str, Tensor]:
        return self._sums.all()

    def memory_bytes(self, numel: int, *, coded: bool = True) -> int:
        """Two vectors, or the momentum of what is averaged exactly."""
        return (2 if coded else 1) * self._sums.stored_bytes(numel)

    def state_dict(self) -> dict[str, Any]:
        return {"speeds": self._speeds.state_dict(), "sums": self._sums.state_dict()}

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """The mean over the old ranks, of either. UserError if another memory wrote a state."""
        if not all("speeds" in state for state in states):
            raise UserError("the checkpoint holds no momentum of compress.kind = 'dgc'; resume with the kind it was made with")
        self._speeds.take_mean([state["speeds"] for state in states])
        self._sums.take_mean([state["sums"] for state in states])


def warmup_fractions(fraction: float) -> list[float]:
    """Those of the stages before `fraction`."""
    found, stage = [], FIRST_FRACTION
    while stage > fraction:
        found.append(stage)
        stage *= STAGE_FACTOR
    return found


class DGC(Counting, Gather):
    """Gathers the largest values of each parameter, at first more of them."""

    def __init__(self, memory: Memory, ledger: Ledger, *, fraction: float = 0.001, warmup_steps: int = 0) -> None:
        """warmup_steps: of each stage; 0: no warm-up."""
        super().__init__(GlobalTopK(fraction), memory, ledger)
        self._warmup = [GlobalTopK(part) for part in warmup_fractions(fraction)] if warmup_steps else []
        self._warmup_steps = warmup_steps
        self._counts = {}
        self.settled_after = len(self._warmup) * warmup_steps

    def codec_for(self, name: str) -> TensorCodec:
        """That of the stage in which the parameter is."""
        count = self.count(name)
        return self._codec if count >= self.settled_after else self._warmup[count // self._warmup_steps]
