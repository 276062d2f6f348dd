"""Error feedback: what coding has lost of a gradient is kept, and added to the next one.

With g the gradient, e the memory, w what should be sent and l = w - (what arrived of it):

    w  = g + d e
    e <- (1 - a) e + a l      after each step; 0 every T steps

    d = 1, a = 1          nothing is ever lost, only late (Seide et al. 2014; Karimireddy et al. 2019): the default
    d = 0.95              SparseLoCo (Sarfi et al. 2025)
    a = 0.8, T = 1024     LoCo (Xie et al. 2024): a moving average of errors, for coarse codes over long runs

DeMo (Peng et al. 2024) keeps a momentum instead, of which what was sent is taken away in part:

    w = d e + g,   e <- w - r (w - l)     d = 0.999, r = 0.2

The memory belongs to a parameter by its name, never to a bucket. It is float32, also of gradients in 16 bits, or block int8,
whose own loss is at most half a step of each block of 256. Of gradients in float64 it is float64: codes take float32, and what w
loses when it becomes float32 is lost like all else, and kept. When the number of ranks changes, each new rank takes the mean of
the old ranks' memories, so that what is still owed to the average, 1/p sum_i e_i, stays the same.

A step may be given up, because some gradient in it is not finite and a GradScaler will leave it out. Where that can happen the
memory is staged: what a step has changed counts from `commit` on, and `rollback` forgets it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from thinwire.compress.precision import Rest, widened
from thinwire.compress.stateless import Stateless
from thinwire.compress.store import Store, flattened
from thinwire.errors import UserError


class Memory(Protocol):
    """One per rank, shared by the averagers of an exchange; each parameter once per step."""

    @property
    def keeps(self) -> bool:
        """Whether `keep` wants to be called."""
        ...

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """[numel] of any real dtype -> [numel] float32: what should be coded. Does not change `gradient`; may return it."""
        ...

    def exact(self, name: str, gradient: Tensor) -> Tensor:
        """As `corrected`, for what is not narrowed before it is sent: [numel] float64 of a gradient in float64."""
        ...

    def keep(self, name: str, lost: Tensor) -> None:
        """[numel] float32: what did not arrive of the latest `corrected`; now the memory's own."""
        ...

    def settle(self, name: str) -> None:
        """All of the latest `corrected` has arrived, exactly: nothing of it is owed."""
        ...

    def stage(self) -> None:
        """From now on every step ends with `commit` or `rollback`."""
        ...

    def commit(self) -> None:
        """What was kept and settled since the last one counts."""
        ...

    def rollback(self) -> None:
        """What was kept and settled since the last `commit` does not count: all is as it was."""
        ...

    def owed(self) -> dict[str, Tensor]:
        """What is kept of each parameter, by name, [numel] float32, or float64 of gradients in float64."""
        ...

    def memory_bytes(self, numel: int, *, coded: bool = True) -> int:
        """What it holds for a parameter of `numel` values that is coded, or averaged exactly."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """UserError if it was made by another kind of memory."""
        ...

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """From the states of all ranks of a run with another number of ranks."""
        ...


@runtime_checkable
class ShardMemory(Memory, Protocol):
    """A memory that can also take parameters cut into the shards of a two-shot average, padded at the end."""

    def place(self, name: str, gradient: Tensor, out: Tensor) -> None:
        """[numel] of any real dtype -> `out` [p, shard] float32: what should be sent, zeros behind its end."""
        ...

    def keep_placed(self, name: str, lost: Tensor, numel: int) -> None:
        """[p, shard] float32: what did not arrive of the latest `place`; now the memory's own."""
        ...


class NoMemory(Stateless):
    """What is lost is lost."""

    keeps = False

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient."""
        return gradient.float()

    def exact(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient."""
        return widened(gradient)

    def stage(self) -> None:
        """Nothing."""

    def commit(self) -> None:
        """Nothing."""

    def rollback(self) -> None:
        """Nothing."""

    def keep(self, name: str, lost: Tensor) -> None:
        """Nothing."""

    def settle(self, name: str) -> None:
        """Nothing."""

    def place(self, name: str, gradient: Tensor, out: Tensor) -> None:
        """The gradient."""
        spread(gradient, out)

    def keep_placed(self, name: str, lost: Tensor, numel: int) -> None:
        """Nothing."""

    def owed(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def memory_bytes(self, numel: int, *, coded: bool = True) -> int:
        """None."""
        return 0


@dataclass
class ErrorFeedback:
    """See the top of the file: d, a, T, r."""

    decay: float = 1.0
    average: float = 1.0
    reset_steps: int = 0
    """0: never."""
    removal: float = 1.0
    storage: Literal["float32", "int8"] = "float32"
    keeps: bool = True
    store: Store = field(init=False)
    steps: dict[str, int] = field(default_factory=dict)
    _sent: dict[str, Tensor] = field(default_factory=dict)
    _rest: Rest = field(default_factory=Rest)
    _counted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(self.storage)

    def stage(self) -> None:
        """Two of e are held from where a parameter is sent to the end of the step."""
        self.store.staged = {}

    def commit(self) -> None:
        """See `Memory`."""
        self.store.commit()
        self._counted.clear()

    def rollback(self) -> None:
        """See `Memory`."""
        self.store.rollback()
        for name in self._counted:
            self.steps[name] -= 1
        self._counted.clear()
        self._sent.clear()

    def owed(self) -> dict[str, Tensor]:
        """By name, [numel]; nothing before the first step."""
        return {name: values for name in self.store.kept if (values := self.store.get(name)) is not None}

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """g + d e"""
        return self._rest.narrowed(name, self.exact(name, gradient))

    def exact(self, name: str, gradient: Tensor) -> Tensor:
        """g + d e"""
        owed, gradient = self.store.get(name), widened(gradient)
        wanted = gradient if owed is None else gradient.add(owed, alpha=self.decay)
        if self.removal != 1.0:
            self._sent[name] = wanted.clone()
        return wanted

    def settle(self, name: str) -> None:
        """e <- 0"""
        self.store.drop(name)
        self._sent.pop(name, None)

    def place(self, name: str, gradient: Tensor, out: Tensor) -> None:
        """g + d e, in one pass where e lies as `out` does."""
        owed = self.store.kept.get(name)
        direct = owed is not None and owed.shape == out.shape and self.storage == "float32" and self.removal == 1.0
        if owed is None or not direct or torch.float64 in (owed.dtype, gradient.dtype):
            spread(self.corrected(name, gradient), out)
            return
        for (values, kept), (_, sent) in zip(laid(gradient, owed), laid(gradient, out), strict=True):
            torch.add(values, kept, alpha=self.decay, out=sent)
        blank(out, gradient.numel())

    def keep_placed(self, name: str, lost: Tensor, numel: int) -> None:
        """As `keep`."""
        if self.reset_steps or self.removal != 1.0 or self.average != 1.0 or self._rest.of(name):
            self.keep(name, flattened(lost, numel))
            return
        self._count(name)
        self.store.put(name, lost, numel)

    def keep(self, name: str, lost: Tensor) -> None:
        """(1 - a) e + a l, or nothing in every T-th step."""
        self._count(name)
        lost = self._rest.with_rest(name, lost)
        if self.reset_steps and self.steps[name] % self.reset_steps == 0:
            lost = torch.zeros_like(lost)
        elif self.removal != 1.0:
            lost = torch.lerp(self._sent.pop(name), lost, self.removal)
        elif self.average != 1.0:
            before = self.store.get(name)
            lost = self.average * lost if before is None else torch.lerp(before, lost, self.average)
        self.store.put(name, lost)

    def _count(self, name: str) -> None:
        self.steps[name] = self.steps.get(name, 0) + 1
        if self.store.staged is not None:
            self._counted.append(name)

    def memory_bytes(self, numel: int, *, coded: bool = True) -> int:
        """4 bytes a value in float32, about 1 in int8, of what is coded."""
        return self.store.stored_bytes(numel) if coded else 0

    def state_dict(self) -> dict[str, Any]:
        """What is owed, and how often each parameter was sent."""
        return {"owed": self.store.state_dict(), "steps": dict(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """UserError if there is nothing owed in it."""
        check_owed([state])
        self.store.take(Store.of(state["owed"]))
        self.steps = dict(state["steps"])

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """1/p sum_i e_i for every new rank."""
        check_owed(states)
        self.store.take_mean([Store.of(state["owed"]) for state in states])
        self.steps = dict(states[0]["steps"])


DEMO = ErrorFeedback(decay=0.999, removal=0.2)
"""As published; see the top of the file."""


def laid(flat: Tensor, shards: Tensor) -> list[tuple[Tensor, Tensor]]:
    """[numel] beside where it lies in [p, shard], row behind row: whole rows, and what is left behind them."""
    full, rest = divmod(flat.numel(), shards.shape[1])
    border = flat.numel() - rest
    whole = flat[:border].view(full, shards.shape[1]), shards[:full]
    return [whole, (flat[border:], shards[full, :rest])] if rest else [whole]


def blank(shards: Tensor, numel: int) -> None:
    """Zeros behind the first `numel` values."""
    full, rest = divmod(numel, shards.shape[1])
    if rest:
        shards[full, rest:] = 0.0
    shards[full + (rest > 0) :] = 0.0


def spread(values: Tensor, out: Tensor) -> None:
    """[numel] -> [p, shard], row behind row, zeros behind the end."""
    for part, place in laid(values, out):
        place.copy_(part)
    blank(out, values.numel())


def check_owed(states: Sequence[dict[str, Any]]) -> None:
    """UserError unless each state was written by a memory."""
    if not all(isinstance(state.get("owed"), dict) for state in states):
        raise UserError("the checkpoint holds nothing that is owed; resume with compress.kind and feedback as it was made with")
