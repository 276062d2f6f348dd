"""Error feedback: the error that coding makes in a gradient is kept, the residual, and added to the next one.

With g the gradient, e the residual, w what should be sent and l = w - (what arrived of it), the error:

    w  = g + d e
    e <- (1 - a) e + a l      after each step; 0 every T steps

    d = 1, a = 1          nothing is ever lost, only late (Seide et al. 2014; Karimireddy et al. 2019): the default
    d = 0.95              SparseLoCo (Sarfi et al. 2025)
    a = 0.8, T = 1024     LoCo (Xie et al. 2024): a moving average of errors, for coarse codes over long runs

DeMo (Peng et al. 2024) keeps a momentum instead, of which what was sent is taken away in part:

    w = d e + g,   e <- w - r (w - l)     d = 0.999, r = 0.2

The residual belongs to a parameter by its name, never to a bucket. It is float32, also of gradients in 16 bits, or block int8,
whose own error is at most half a step of each block of 256. Of gradients in float64 it is float64: codes take float32, and what w
loses when it becomes float32 is part of its error. When the number of ranks changes, each new rank takes the mean of the old
ranks' residuals, so that what the average still lacks, 1/p sum_i e_i, stays the same.

A step may be given up, because some gradient in it is not finite and a GradScaler will leave it out. Where that can happen the
memory is staged: what a step has changed counts from `commit` on, and `rollback` forgets it. On a device, where the host does not
know whether it has to, `commit` is told by a flag; there what is counted on the host (T) counts steps that were given up, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from thinwire.compress.base import Flat
from thinwire.compress.codecs.blockwise import Int8
from thinwire.compress.precision import Rest, widened
from thinwire.errors import UserError

Storage = Literal["float32", "int8"]
BLOCKS = Flat(Int8())


class Stateless:
    """The part of a contract that is about state, for those without any; others override the first and the last method."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank carries from step to step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first step. UserError for a state that would not be used, here any."""
        self.adopt([state])

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Instead of load_state_dict, the states of all ranks of a run with another number of ranks."""
        for state in states:
            if state:
                raise UserError(self._of_no_use(state))

    def _of_no_use(self, state: dict[str, Any]) -> str:
        return (
            f"the checkpoint holds {', '.join(map(str, state))}, which nothing here would use; resume with [sync] and [compress] "
            "as it was made with"
        )


class Memory(Stateless):
    """What one rank keeps of each parameter, here nothing. Shared by the averagers of an exchange; each parameter once a step."""

    keeps = False
    """Whether `keep` wants to be called."""

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """[numel] of any real dtype -> [numel] float32: what should be coded. Does not change `gradient`; may return it."""
        return gradient.float()

    def exact(self, name: str, gradient: Tensor) -> Tensor:
        """As `corrected`, for what is not narrowed before it is sent: [numel] float64 of a gradient in float64."""
        return widened(gradient)

    def stage(self) -> None:
        """From now on every step ends with `commit` or `rollback`."""

    def commit(self, unless: Tensor | None = None) -> None:
        """What was kept and cleared since the last one counts; unless: a flag on the device, [] bool: where it is true, it does
        not, as after `rollback`."""

    def forget(self, name: str, where: Tensor) -> None:
        """What is kept and cleared of one parameter before the next `commit` will not count if `where` is true, [] bool on the
        device. The memory is staged."""

    def to(self, device: torch.device) -> None:
        """What is kept goes there."""

    def rollback(self) -> None:
        """What was kept and cleared since the last `commit` does not count: all is as it was."""

    def keep(self, name: str, error: Tensor) -> None:
        """[numel] float32: what did not arrive of the latest `corrected`; now the memory's own."""

    def clear(self, name: str) -> None:
        """All of the latest `corrected` has arrived, exactly: no residual is left."""

    def corrected_rows(self, name: str, gradient: Tensor, out: Tensor) -> None:
        """As `corrected`, into the shards of a two-shot average: `out` [p, shard], zeros behind the end."""
        spread(self.corrected(name, gradient), out)

    def keep_rows(self, name: str, error: Tensor, numel: int) -> None:
        """As `keep`, of the latest `corrected_rows`: [p, shard] float32."""
        self.keep(name, flattened(error, numel))

    def restore(self, name: str, average: Tensor | None) -> None:
        """[numel]: what arrived of the latest `corrected`, to the units of the gradient, in place; None: nothing did."""

    def residuals(self) -> dict[str, Tensor]:
        """What is kept of each parameter, by name, [numel] float32 or float64; nothing before the first step."""
        return {}

    def memory_bytes(self, numel: int, *, coded: bool = True) -> int:
        """What it holds for a parameter of `numel` values that is coded, or averaged exactly."""
        return 0


class NoMemory(Memory):
    """What is lost is lost."""


@dataclass
class Store:
    """Flat vectors by name, as they are (float32, or float64) or as block int8."""

    storage: Storage = "float32"
    kept: dict[str, Tensor] = field(default_factory=dict)
    """As stored: values of any shape, or the codes of a flat vector; only the first `numels` values count."""
    numels: dict[str, int] = field(default_factory=dict)
    staged: dict[str, tuple[Tensor, int] | None] | None = None
    """What `commit` will keep, or drop where it is None; None: `put` and `drop` count at once."""
    forgotten: dict[str, Tensor] = field(default_factory=dict)
    """By name, a flag: whether what is staged does not count."""

    def put(self, name: str, values: Tensor, numel: int | None = None) -> None:
        """Keeps `values` themselves, or codes of them; the first `numel` of them, all by default."""
        numel = values.numel() if numel is None else numel
        if self.staged is None:
            self._count(name, self._stored(values, numel))
        else:
            self.staged[name] = self._stored(values, numel)

    def get(self, name: str) -> Tensor | None:
        """None if there is nothing under this name."""
        if name not in self.kept:
            return None
        numel = self.numels[name]
        return flattened(self.kept[name], numel) if self.storage == "float32" else BLOCKS.decode(self.kept[name], (numel,))

    def all(self) -> dict[str, Tensor]:
        return {name: values for name in self.kept if (values := self.get(name)) is not None}

    def drop(self, name: str) -> None:
        """Nothing is kept under this name any more."""
        if self.staged is None:
            self._count(name, None)
        else:
            self.staged[name] = None

    def commit(self, unless: Tensor | None = None) -> None:
        """See `Memory.commit`."""
        for name, entry in (self.staged or {}).items():
            flags = [flag for flag in (unless, self.forgotten.get(name)) if flag is not None]
            self._count(name, entry if not flags else self._chosen(name, entry, torch.stack(flags).any()))
        self.staged, self.forgotten = {}, {}

    def rollback(self) -> None:
        """What is staged does not count."""
        self.staged, self.forgotten = {}, {}

    def to(self, device: torch.device) -> None:
        self.kept = {name: values.to(device) for name, values in self.kept.items()}

    def _chosen(self, name: str, entry: tuple[Tensor, int] | None, old: Tensor) -> tuple[Tensor, int] | None:
        """What counted before where `old` is true, else `entry`, which is overwritten; nothing is zeros."""
        before = self.kept.get(name)
        if entry is None:
            return None if before is None else (before.masked_fill_(~old, 0), self.numels[name])
        values, numel = entry
        if before is None:
            return values.masked_fill_(old, 0), numel
        if before.shape == values.shape:
            return torch.where(old, before, values, out=values), numel
        assert self.storage == "float32", "codes of one vector have one shape"
        return torch.where(old, flattened(before, numel), flattened(values, numel)), numel

    def _stored(self, values: Tensor, numel: int) -> tuple[Tensor, int]:
        return (values if self.storage == "float32" else BLOCKS.encode(flattened(values, numel).float())), numel

    def _count(self, name: str, entry: tuple[Tensor, int] | None) -> None:
        """From now on; None: there is nothing."""
        if entry is None:
            self.kept.pop(name, None)
            self.numels.pop(name, None)
        else:
            self.kept[name], self.numels[name] = entry

    def stored_bytes(self, numel: int) -> int:
        """Of one vector."""
        return 4 * numel if self.storage == "float32" else BLOCKS.payload_bytes((numel,))

    def state_dict(self) -> dict[str, Any]:
        """Codes are saved as codes, so that a resumed run goes on bit for bit."""
        kept = dict(self.kept) if self.storage == "int8" else self.all()
        return {"storage": self.storage, "kept": kept, "numels": dict(self.numels)}

    def take_mean(self, states: Sequence[dict[str, Any]]) -> None:
        """For each name the mean over states of stores, absent ones counting as zero; one state of this storage to the bit.

        It counts at once, also where steps are staged.
        """
        others = [Store(state["storage"], dict(state["kept"]), dict(state["numels"])) for state in states]
        if len(others) == 1 and others[0].storage == self.storage:
            self.kept, self.numels = others[0].kept, others[0].numels
            return
        for name in dict.fromkeys(name for other in others for name in other.kept):
            found = [values for other in others if (values := other.get(name)) is not None]
            mean = torch.stack(found).sum(0).div_(len(others))
            self._count(name, self._stored(mean, mean.numel()))


@dataclass
class ErrorFeedback(Memory):
    """See the top of the file: d, a, T, r."""

    decay: float = 1.0
    average: float = 1.0
    reset_steps: int = 0
    """0: never."""
    removal: float = 1.0
    storage: Storage = "float32"
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

    def commit(self, unless: Tensor | None = None) -> None:
        self.store.commit(unless)
        self._counted.clear()

    def forget(self, name: str, where: Tensor) -> None:
        self.store.forgotten[name] = where

    def to(self, device: torch.device) -> None:
        self.store.to(device)

    def rollback(self) -> None:
        self.store.rollback()
        for name in self._counted:
            self.steps[name] -= 1
        self._counted.clear()

    def residuals(self) -> dict[str, Tensor]:
        return self.store.all()

    def corrected(self, name: str, gradient: Tensor) -> Tensor:
        """g + d e"""
        return self._rest.narrowed(name, self.exact(name, gradient))

    def exact(self, name: str, gradient: Tensor) -> Tensor:
        """g + d e"""
        residual, gradient = self.store.get(name), widened(gradient)
        wanted = gradient if residual is None else gradient.add(residual, alpha=self.decay)
        if self.removal != 1.0:
            self._sent[name] = wanted.clone()
        return wanted

    def clear(self, name: str) -> None:
        """e <- 0"""
        self.store.drop(name)
        self._sent.pop(name, None)

    def corrected_rows(self, name: str, gradient: Tensor, out: Tensor) -> None:
        """g + d e, in one pass where e lies as `out` does."""
        residual = self.store.kept.get(name)
        one_pass = residual is not None and residual.shape == out.shape and self.storage == "float32" and self.removal == 1.0
        if residual is None or not one_pass or torch.float64 in (residual.dtype, gradient.dtype):
            super().corrected_rows(name, gradient, out)
            return
        for (values, kept), (_, sent) in zip(beside(gradient, residual), beside(gradient, out), strict=True):
            torch.add(values, kept, alpha=self.decay, out=sent)
        blank(out, gradient.numel())

    def keep_rows(self, name: str, error: Tensor, numel: int) -> None:
        """As `keep`; as it lies where it is kept whole."""
        if self.reset_steps or self.removal != 1.0 or self.average != 1.0 or self._rest.of(name):
            super().keep_rows(name, error, numel)
            return
        self._count(name)
        self.store.put(name, error, numel)

    def keep(self, name: str, error: Tensor) -> None:
        """(1 - a) e + a l, or nothing in every T-th step."""
        self._count(name)
        error = self._rest.with_rest(name, error)
        if self.reset_steps and self.steps[name] % self.reset_steps == 0:
            error = torch.zeros_like(error)
        elif self.removal != 1.0:
            error = torch.lerp(self._sent.pop(name), error, self.removal)
        elif self.average != 1.0:
            before = self.store.get(name)
            error = self.average * error if before is None else torch.lerp(before, error, self.average)
        self.store.put(name, error)

    def _count(self, name: str) -> None:
        self.steps[name] = self.steps.get(name, 0) + 1
        if self.store.staged is not None:
            self._counted.append(name)

    def memory_bytes(self, numel: int, *, coded: bool = True) -> int:
        """4 bytes a value in float32, about 1 in int8, of what is coded."""
        return self.store.stored_bytes(numel) if coded else 0

    def state_dict(self) -> dict[str, Any]:
        """The residuals, and how often each parameter was sent."""
        return {"owed": self.store.state_dict(), "steps": dict(self.steps)}

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """1/p sum_i e_i for every new rank. UserError if there are no residuals in one."""
        if not all(isinstance(state.get("owed"), dict) for state in states):
            raise UserError("the checkpoint holds no residuals; resume with compress.kind and feedback as it was made with")
        self.store.take_mean([state["owed"] for state in states])
        self.steps = dict(states[0]["steps"])


DEMO = ErrorFeedback(decay=0.999, removal=0.2)
"""As published; see the top of the file."""


def beside(flat: Tensor, shards: Tensor) -> list[tuple[Tensor, Tensor]]:
    """[numel] and where it lies in [p, shard], row behind row: whole rows, and what is left behind them."""
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
    for part, place in beside(values, out):
        place.copy_(part)
    blank(out, values.numel())


def flattened(values: Tensor, numel: int) -> Tensor:
    """The first `numel` values, row behind row; a copy unless they are all there is of `values`, in one piece."""
    if values.dim() == 1 and values.numel() == numel:
        return values
    return values.reshape(-1)[:numel].clone()
