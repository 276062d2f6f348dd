"""[sync]: how often replicas exchange what."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from thinwire.tomlfile import Section
from thinwire.units import parse

Bytes = Annotated[int, BeforeValidator(lambda value: int(parse(value, "B")))]


class _Sync(Section):
    rare: ClassVar[bool] = False
    """Whether replicas differ between exchanges; they then lie on the layout's outer axis."""

    accumulate: int = Field(1, ge=1)
    """Micro-batches per step and rank, whose gradients are added up."""
    bucket_bytes: Bytes = Field(0, ge=0)
    """Gradients are handed to the wire in buckets of at least this size, while the backward pass goes on. Small ones overlap
    better and cost more processor time. 0: as PyTorch does it, a first bucket of 1 MiB, then of 25 MiB."""

    @property
    def by_speed(self) -> bool:
        """Whether faster ranks get more micro-batches."""
        return False


class EveryStep(_Sync):
    """Gradients are averaged in each optimizer step, once for `accumulate` micro-batches."""

    kind: Literal["every_step"] = "every_step"
    assign: Literal["equal", "by_speed"] = "equal"
    """Who computes how many of the step's micro-batches, which are `accumulate` times the ranks: all as many, or faster ranks
    more, by their measured speed, looked at in each report."""

    @property
    def by_speed(self) -> bool:
        return self.assign == "by_speed"

    @model_validator(mode="after")
    def _check(self) -> EveryStep:
        if self.by_speed and self.accumulate < 2:
            raise ValueError(
                "assign = 'by_speed' with accumulate = 1 leaves each rank its one micro-batch; set accumulate to 4 or more, "
                "and train.micro_batch to less"
            )
        return self


class _Rare(_Sync):
    rare: ClassVar[bool] = True

    every: int = Field(30, ge=1)
    """Steps that replicas go alone (H)."""
    outer_device: Literal["device", "host"] = "device"
    """Where anchors and outer momentum lie between exchanges: on the device of the parameters, or in pinned memory of its host.
    On CPUs these are one."""

    @model_validator(mode="before")
    @classmethod
    def _no_assignment(cls, values: Any) -> Any:
        if isinstance(values, dict) and "assign" in values:
            raise ValueError(f"assign = {values['assign']!r}: only kind = 'every_step' assigns micro-batches; leave it out")
        return values


class LocalSGD(_Rare):
    """Replicas average their parameters now and then."""

    kind: Literal["local_sgd"] = "local_sgd"
    every: int = Field(8, ge=1)
    every_inside: int = Field(0, ge=0)
    """Hierarchical: the ranks of the data axis, near each other, average every so many steps; 0: they average gradients each
    step."""

    @model_validator(mode="after")
    def _check(self) -> LocalSGD:
        if self.every_inside and self.every % self.every_inside:
            raise ValueError(f"every = {self.every} must be a multiple of every_inside = {self.every_inside}")
        return self


class _Outer(_Rare):
    outer_learning_rate: float | None = Field(None, gt=0)
    """Of the step along the averaged pseudo-gradient; None: what was published, for diloco from the number of replicas, found at
    every = 30. The best one is said to rise with `every`, by no known formula: far from 30, try some."""
    outer_momentum: float = Field(0.9, ge=0, lt=1)
    """Nesterov's."""


class DiLoCo(_Outer):
    """Replicas go alone; what each has moved is averaged and goes through an outer optimizer."""

    kind: Literal["diloco"] = "diloco"


class Streaming(_Outer):
    """DiLoCo a fragment at a time, while training goes on."""

    kind: Literal["streaming"] = "streaming"
    layers_per_fragment: int = Field(3, ge=1)
    overlap: int = Field(1, ge=0)
    """Steps between sending a fragment and applying what came back (tau)."""
    mixing: float | None = Field(None, ge=0, lt=1)
    """How much of a replica's own parameters stays when the new ones come (alpha). None: 0.5, and 0 without an overlap, in which
    there is nothing of its own to keep."""

    @model_validator(mode="after")
    def _check(self) -> Streaming:
        if self.overlap >= self.every:
            raise ValueError(
                f"overlap = {self.overlap} must be less than every = {self.every}, or a fragment is sent twice at once"
            )
        if self.mixing is not None and not self.overlap:
            raise ValueError(
                f"mixing = {self.mixing} has no effect without an overlap; set overlap to 1 or more, or leave it out"
            )
        return self


class SparseLoCo(_Rare):
    """Sparse pseudo-gradients with error feedback and no outer momentum."""

    kind: Literal["sparseloco"] = "sparseloco"
    outer_learning_rate: float = Field(1.0, gt=0)
    """1 at first; 0.65 late in training."""


class MuLoCo(_Outer):
    """DiLoCo whose inner optimizer is Muon; set train.optimizer.kind = "muon"."""

    kind: Literal["muloco"] = "muloco"
    outer_learning_rate: float | None = Field(0.7, gt=0)
    outer_momentum: float = Field(0.6, ge=0, lt=1)


class NoLoCo(_Rare):
    """Pairs drawn at random exchange; there is no all-reduce."""

    kind: Literal["noloco"] = "noloco"
    every: int = Field(50, ge=1)
    outer_learning_rate: float = Field(0.7, gt=0)
    outer_momentum: float = Field(0.5, ge=0, lt=1)


def _every_step_unless_named(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "deal" in value:
        warnings.warn("sync.deal is now called sync.assign", FutureWarning, stacklevel=2)
        value = {"assign" if key == "deal" else key: option for key, option in value.items()}
    return {"kind": "every_step", **value}


Sync = Annotated[
    EveryStep | LocalSGD | DiLoCo | Streaming | SparseLoCo | MuLoCo | NoLoCo,
    Field(discriminator="kind"),
    BeforeValidator(_every_step_unless_named),
]
