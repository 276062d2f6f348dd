"""Deep gradient compression: the largest of what has gathered, with the momentum corrected for what waits.

With plain error feedback behind an optimizer with momentum, a value that waited t steps enters the momentum once and late. DGC
keeps the momentum on the rank instead, before the choice, for each parameter:

    u <- m u + g          the momentum, m = 0.9
    v <- v + u            what should be sent
    sent: the largest of v (`largest`), gathered from all ranks (`gather`), their mean is the result
    v <- v - what arrived of it        where something was sent: the rounding of its bfloat16; elsewhere v stays
    u <- 0                             where something was sent (momentum factor masking), else it pushes on in a stale direction

so 1/p sum_i v_i (after) = 1/p sum_i (v_i + u_i) - result. What is not coded (vectors, what is excluded, all on one rank or before
`after_steps` are over) takes the same way without a choice: u <- m u + g, the result is the mean of u + v, v <- 0, and u is not
masked. The optimizer must have no momentum of its own (plain SGD), for then the step of what is not coded is that of SGD with
momentum m; behind AdamW gradients are smoothed twice. Masking makes coded values go less far than SGD with momentum would, 0.8 of
its way where every value is sent in one step of a hundred; that is as published.

Warm-up, T steps each, after which the traffic is settled:

    25 %, 6.25 %, 1.56 %, 0.39 %, ..., as long as that is more than the fraction asked for

With 6 bytes a value and p - 1 receivers, 25 % cost more than a plain all-reduce where p > 5: so warm-up pays on small groups, and
there is none by default. The paper clips the local gradient by its norm over the whole model, which is not known when the first
bucket leaves; that is left out. u and v are float32 or block int8. When the number of ranks changes, every new rank takes their
means.

Lin et al. 2018 (Deep Gradient Compression).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece, Share
from thinwire.compress.codecs.largest import GlobalTopK
from thinwire.compress.gather import Gather
from thinwire.compress.memory import Memory
from thinwire.compress.precision import Rest, widened
from thinwire.compress.store import Store
from thinwire.config.compress import Coded
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.workload import Parameter

FIRST_FRACTION, STAGE_FACTOR = 0.25, 0.25


class MomentumCorrection:
    """u and v of each parameter; see the top of the file, and `thinwire.compress.memory.Memory`."""

    keeps = True

    def __init__(self, momentum: float = 0.9, storage: Literal["float32", "int8"] = "float32") -> None:
        self._momentum = momentum
        self._speeds, self._sums = Store(storage), Store(storage)
        self._wanted: dict[str, tuple[Tensor, Tensor]] = {}
        self._rest = Rest()

    def stage(self) -> None:
        """See `thinwire.compress.memory.Memory`."""
        self._speeds.staged, self._sums.staged = {}, {}

    def commit(self) -> None:
        """See `thinwire.compress.memory.Memory`."""
        self._speeds.commit()
        self._sums.commit()

    def rollback(self) -> None:
        """See `thinwire.compress.memory.Memory`."""
        self._speeds.rollback()
        self._sums.rollback()

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """v, with this step's u."""
        narrow = self._rest.narrowed(name, self.exact(name, gradient))
        self._wanted[name] = self._wanted[name][0], narrow
        return narrow

    def exact(self, name: str, gradient: Tensor) -> Tensor:
        """As `corrected`."""
        before, waiting, gradient = self._speeds.get(name), self._sums.get(name), widened(gradient)
        speed = gradient.clone() if before is None else gradient.add(before, alpha=self._momentum)
        wanted = speed.clone() if waiting is None else speed + waiting
        self._wanted[name] = speed, wanted
        return wanted

    def keep(self, name: str, lost: Tensor) -> None:
        """v is what was lost; u is zero where that is not all of it."""
        speed, wanted = self._wanted.pop(name)
        self._speeds.put(name, speed.masked_fill_(lost != wanted, 0.0))
        self._sums.put(name, self._rest.with_rest(name, lost))

    def settle(self, name: str) -> None:
        """All of v has arrived exactly; u goes on, as SGD's does."""
        self._speeds.put(name, self._wanted.pop(name)[0])
        self._sums.drop(name)

    def owed(self) -> dict[str, Tensor]:
        """v of each parameter."""
        found = {name: self._sums.get(name) for name in self._sums.kept}
        return {name: values for name, values in found.items() if values is not None}

    def memory_bytes(self, numel: int, *, coded: bool = True) -> int:
        """Two vectors, or the momentum of what is averaged exactly."""
        return (2 if coded else 1) * self._sums.stored_bytes(numel)

    def state_dict(self) -> dict[str, Any]:
        """u and v."""
        return {"speeds": self._speeds.state_dict(), "sums": self._sums.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """UserError if another memory wrote it."""
        _check([state])
        self._speeds.take(Store.of(state["speeds"]))
        self._sums.take(Store.of(state["sums"]))

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """The mean over the old ranks, of either."""
        _check(states)
        self._speeds.take_mean([Store.of(state["speeds"]) for state in states])
        self._sums.take_mean([Store.of(state["sums"]) for state in states])


def dgc_memory(config: Coded) -> MomentumCorrection:
    """As [compress] asks for it. UserError for options of error feedback, which it is not."""
    usual = Coded(kind="dgc")
    for option in ("feedback", "feedback_decay", "feedback_average", "feedback_reset", "feedback_removal"):
        if getattr(config, option) != getattr(usual, option):
            raise UserError(f"compress.{option} = {getattr(config, option)}: dgc keeps a momentum in its own way; leave it out")
    momentum = {} if config.momentum is None else {"momentum": config.momentum}
    return MomentumCorrection(storage=config.feedback_storage or "float32", **momentum)


def _check(states: Sequence[dict[str, Any]]) -> None:
    if not all("speeds" in state for state in states):
        raise UserError("the checkpoint holds no momentum of compress.kind = 'dgc'; resume with the kind it was made with")


def warmup_fractions(fraction: float) -> list[float]:
    """Those of the stages before `fraction`."""
    found, stage = [], FIRST_FRACTION
    while stage > fraction:
        found.append(stage)
        stage *= STAGE_FACTOR
    return found


class DGC:
    """Gathers the largest values of each parameter, at first more of them. How often each was sent goes on from step to step."""

    def __init__(self, memory: Memory, ledger: Ledger, *, fraction: float = 0.001, warmup_steps: int = 0) -> None:
        """warmup_steps: of each stage; 0: no warm-up."""
        self._warmup_steps = warmup_steps
        before = warmup_fractions(fraction) if warmup_steps else []
        self._stages = [Gather(GlobalTopK(part), memory, ledger) for part in [*before, fraction]]
        self._counts: dict[str, int] = {}

    @property
    def settled_after(self) -> int:
        """The length of the warm-up."""
        return (len(self._stages) - 1) * self._warmup_steps

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """After the warm-up."""
        return self._stages[-1].sent_bytes(shape, world_size)

    def carries(self, numel: int, world_size: int) -> bool:
        """As `Gather`."""
        return self._stages[-1].carries(numel, world_size)

    def transfers(
        self, label: str, parameters: Sequence[Parameter], exact: Sequence[Parameter], axis: str, world_size: int
    ) -> list[Transfer]:
        """One all-gather; its size is that after the warm-up."""
        return self._stages[-1].transfers(label, parameters, exact, axis, world_size)

    def attach(self, first: dist.ProcessGroup, second: dist.ProcessGroup) -> None:
        """Those of every stage of the warm-up."""
        for stage in self._stages:
            stage.attach(first, second)

    def average(self, share: Share) -> Iterator[None]:
        """One collective for all pieces that are in the same stage, as they are unless a parameter came later."""
        stages: list[list[Piece]] = [[] for _ in self._stages]
        for piece in share.pieces:
            count = self._counts.get(piece.name, 0)
            self._counts[piece.name] = count + 1
            stages[min(count // self._warmup_steps, len(stages) - 1) if self._warmup_steps else -1].append(piece)
        exact = share.exact
        under_way, parts = [], []
        for stage, pieces in zip(self._stages, stages, strict=True):
            if pieces:
                parts.append(share.of(pieces, exact))
                under_way.append(stage.average(parts[-1]))
                exact = ()
        for average in under_way:
            next(average)
        yield
        for average, part in zip(under_way, parts, strict=True):
            yield from average
            share.nonfinite |= part.nonfinite

    def state_dict(self) -> dict[str, Any]:
        """How often each parameter was sent."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where it was."""
        self._counts = dict(state["counts"])

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Counts were equal on all ranks."""
        self.load_state_dict(states[0])
