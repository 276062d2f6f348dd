"""Error feedback: what coding has lost of a gradient is kept, and added to the next one.

With g the gradient, e the memory, w what should be sent and l = w - (what arrived of it):

    w  = g + d e
    e <- (1 - a) e + a l      after each step; 0 every T steps

    d = 1, a = 1          nothing is ever lost, only late (Seide et al. 2014; Karimireddy et al. 2019): the default
    d = 0.95              SparseLoCo (Sarfi et al. 2025)
    a = 0.8, T = 1024     LoCo (Xie et al. 2024): a moving average of errors, for coarse codes over long runs

DeMo (Peng et al. 2024) keeps a momentum instead, of which what was sent is taken away in part:

    w = d e + g,   e <- w - r (w - l)     d = 0.999, r = 0.2

The memory belongs to a parameter by its name, never to a bucket. It is float32, or block int8, whose own loss is at most half a
step of each block of 256. When the number of ranks changes, each new rank takes the mean of the old ranks' memories, so that what
is still owed to the average, 1/p sum_i e_i, stays the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from thinwire.compress.codecs.blockwise import INT8_BLOCK, Int8
from thinwire.compress.stateless import Stateless
from thinwire.errors import UserError


class Memory(Protocol):
    """One per rank, shared by the averagers of an exchange; each parameter once per step."""

    @property
    def keeps(self) -> bool:
        """Whether `keep` wants to be called."""
        ...

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """[numel] float32 -> [numel]: what should be sent. Does not change `gradient`; may return it."""
        ...

    def keep(self, name: str, lost: Tensor) -> None:
        """[numel] float32: what did not arrive of the latest `corrected`; now the memory's own."""
        ...

    def settle(self, name: str) -> None:
        """All of the latest `corrected` has arrived, exactly: nothing of it is owed."""
        ...

    def owed(self) -> dict[str, Tensor]:
        """What is kept of each parameter, by name, [numel] float32."""
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
        """[numel] float32 -> `out` [p, shard]: what should be sent, zeros behind its end."""
        ...

    def keep_placed(self, name: str, lost: Tensor, numel: int) -> None:
        """[p, shard] float32: what did not arrive of the latest `place`; now the memory's own."""
        ...


class NoMemory(Stateless):
    """What is lost is lost."""

    keeps = False

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient."""
        return gradient

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
class Store:
    """Flat float32 vectors by name, as they are or as block int8."""

    storage: Literal["float32", "int8"] = "float32"
    kept: dict[str, Tensor] = field(default_factory=dict)
    """As stored: float32 of any shape, or the codes of a flat vector; only the first `numels` values count."""
    numels: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, values: Tensor, numel: int | None = None) -> None:
        """Keeps `values` themselves, or codes of them; the first `numel` of them, all by default."""
        self.numels[name] = values.numel() if numel is None else numel
        if self.storage == "float32":
            self.kept[name] = values
        else:
            flat = flattened(values, self.numels[name])
            self.kept[name] = Int8().encode(pad(flat, (0, -flat.numel() % INT8_BLOCK)))

    def get(self, name: str) -> Tensor | None:
        """None if there is nothing under this name."""
        if name not in self.kept:
            return None
        if self.storage == "float32":
            return flattened(self.kept[name], self.numels[name])
        padded = -(-self.numels[name] // INT8_BLOCK) * INT8_BLOCK
        return Int8().decode(self.kept[name], padded)[: self.numels[name]]

    def drop(self, name: str) -> None:
        """Nothing is kept under this name any more."""
        self.kept.pop(name, None)
        self.numels.pop(name, None)

    def stored_bytes(self, numel: int) -> int:
        """Of one vector."""
        return 4 * numel if self.storage == "float32" else Int8().payload_bytes(-(-numel // INT8_BLOCK) * INT8_BLOCK)

    def state_dict(self) -> dict[str, Any]:
        """Codes are saved as codes, so that a resumed run goes on bit for bit."""
        kept = dict(self.kept) if self.storage == "int8" else {name: self.get(name) for name in self.kept}
        return {"storage": self.storage, "kept": kept, "numels": dict(self.numels)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Store":
        """From a state_dict."""
        return cls(state["storage"], dict(state["kept"]), dict(state["numels"]))

    def take(self, other: "Store") -> None:
        """All of `other`, in this one's storage; as it is where that is the same."""
        if other.storage == self.storage:
            self.kept, self.numels = other.kept, other.numels
            return
        for name in other.kept:
            values = other.get(name)
            assert values is not None
            self.put(name, values)

    def take_mean(self, others: Sequence["Store"]) -> None:
        """For each name the mean over `others`, where absent counts as zero."""
        for name in dict.fromkeys(name for other in others for name in other.kept):
            found = [values for other in others if (values := other.get(name)) is not None]
            self.put(name, torch.stack(found).sum(0).div_(len(others)))


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

    def __post_init__(self) -> None:
        self.store = Store(self.storage)

    def owed(self) -> dict[str, Tensor]:
        """By name, [numel] float32; nothing before the first step."""
        return {name: values for name in self.store.kept if (values := self.store.get(name)) is not None}

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """g + d e"""
        owed = self.store.get(name)
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
        if owed is None or owed.shape != out.shape or self.storage != "float32" or self.removal != 1.0:
            spread(self.corrected(name, gradient), out)
            return
        for (values, kept), (_, sent) in zip(laid(gradient, owed), laid(gradient, out), strict=True):
            torch.add(values, kept, alpha=self.decay, out=sent)
        blank(out, gradient.numel())

    def keep_placed(self, name: str, lost: Tensor, numel: int) -> None:
        """As `keep`."""
        if self.reset_steps or self.removal != 1.0 or self.average != 1.0:
            self.keep(name, flattened(lost, numel))
            return
        self.steps[name] = self.steps.get(name, 0) + 1
        self.store.put(name, lost, numel)

    def keep(self, name: str, lost: Tensor) -> None:
        """(1 - a) e + a l, or nothing in every T-th step."""
        self.steps[name] = self.steps.get(name, 0) + 1
        if self.reset_steps and self.steps[name] % self.reset_steps == 0:
            lost = torch.zeros_like(lost)
        elif self.removal != 1.0:
            lost = torch.lerp(self._sent.pop(name), lost, self.removal)
        elif self.average != 1.0:
            before = self.store.get(name)
            lost = self.average * lost if before is None else torch.lerp(before, lost, self.average)
        self.store.put(name, lost)

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


def flattened(values: Tensor, numel: int) -> Tensor:
    """The first `numel` values, row behind row; a copy unless they are all there is of `values`, in one piece."""
    if values.dim() == 1 and values.numel() == numel:
        return values
    return values.reshape(-1)[:numel].clone()


def check_owed(states: Sequence[dict[str, Any]]) -> None:
    """UserError unless each state was written by a memory."""
    if not all(isinstance(state.get("owed"), dict) for state in states):
        raise UserError("the checkpoint holds nothing that is owed; resume with compress.kind and feedback as it was made with")
