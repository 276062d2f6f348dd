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

    def phases(self, steps: int) -> list[tuple[int, Any]]:
        """Of a run of so many steps: (steps, what holds in them), pair after pair."""
        return [(steps, self)]

    def check(self, train: Any, layout: Any) -> None:
        """ValueError if the kind does not go with these sections."""


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


class _Rising(_Rare):
    first: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], ...] = ()
    """[[steps, H], ..]: the first so many steps with an exchange every H, pair after pair, each of whole periods; then every
    `every`. Early steps are worth most."""

    @model_validator(mode="after")
    def _check_first(self) -> _Rising:
        for steps, every in self.first:
            if steps % every:
                raise ValueError(f"first = {steps} steps every {every}: that is no number of whole periods; give a multiple")
        return self

    @property
    def least_every(self) -> int:
        """The shortest period that there is."""
        return min(self.every, *(every for _, every in self.first)) if self.first else self.every

    def phases(self, steps: int) -> list[tuple[int, Any]]:
        found, plain = list[tuple[int, Any]](), self.model_copy(update={"first": ()})
        for many, every in self.first:
            found.append((min(many, steps), plain.model_copy(update={"every": every})))
            steps -= found[-1][0]
        return [*found, (steps, plain)]


class Retrace(_Rising):
    """Replicas go alone for some steps, average the gradients of these, and all take the steps again with the average."""

    kind: Literal["retrace"] = "retrace"
    every: int = Field(4, ge=2)
    bucket_bytes: Bytes = Field(0, ge=0)
    """Parameters lie, cut into rows where they are large, in buckets of at least this size, which take turns: each is exchanged
    every so many steps. 0: three for each turn, of 64 KiB to 25 MiB."""

    @model_validator(mode="after")
    def _check(self) -> Retrace:
        if self.outer_device == "host":
            raise ValueError("outer_device = 'host': what kind = 'retrace' keeps is used in each step; leave it out")
        return self

    def check(self, train: Any, layout: Any) -> None:
        optimizer, axes = train.optimizer, ("data", "pipe", "expert", "seq", "shard", "tensor")
        if optimizer.kind != "adamw" or optimizer.states != "full":
            raise ValueError(
                "sync.kind = 'retrace' takes steps of train.optimizer.kind = 'adamw' again, with states = 'full'; take these, or "
                "sync.kind = 'streaming'"
            )
        if train.updates == "early" or "optimizer" in train.on_host:
            raise ValueError(
                "sync.kind = 'retrace' needs all gradients of a step, and the optimizer's state where the parameters are; leave "
                "train.updates and train.on_host out"
            )
        for axis in axes:
            if getattr(layout, axis) > 1:
                raise ValueError(
                    f"sync.kind = 'retrace' with layout.{axis} = {getattr(layout, axis)}: a replica is one rank; set it to 1, or "
                    "take sync.kind = 'streaming'"
                )


class _Outer(_Rising):
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
    arrival: Literal["mix", "add"] = "mix"
    """What a replica makes of new parameters: it mixes them with its own, as published, or adds what it has itself moved since
    they were sent, and then keeps nothing of where it stood apart from the others."""

    @model_validator(mode="after")
    def _check(self) -> Streaming:
        if self.overlap >= self.least_every:
            raise ValueError(
                f"overlap = {self.overlap} must be less than every = {self.least_every}, or a fragment is sent twice at once"
            )
        if self.arrival == "add" and (self.mixing is not None or not self.overlap):
            raise ValueError(
                f"arrival = 'add' takes the place of mixing where there is an overlap, with overlap = {self.overlap} and "
                f"mixing = {self.mixing}: leave mixing out, and set overlap to 1 or more"
            )
        if self.mixing is not None and not self.overlap:
            raise ValueError(
                f"mixing = {self.mixing} has no effect without an overlap; set overlap to 1 or more, or leave it out"
            )
        return self


class SparseLoCo(_Rising):
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


class Auto(_Sync):
    """One of the others, which `thinwire train` takes before anything starts: by the measured front, for the cluster's links."""

    kind: Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Auto:
        if self.bucket_bytes:
            raise ValueError(f"bucket_bytes = {self.bucket_bytes} with kind = 'auto', which chooses buckets too; leave it out")
        return self


def _every_step_unless_named(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "deal" in value:
        warnings.warn("sync.deal is now called sync.assign", FutureWarning, stacklevel=2)
        value = {"assign" if key == "deal" else key: option for key, option in value.items()}
    return {"kind": "every_step", **value}


Sync = Annotated[
    EveryStep | LocalSGD | DiLoCo | Streaming | SparseLoCo | MuLoCo | NoLoCo | Retrace | Auto,
    Field(discriminator="kind"),
    BeforeValidator(_every_step_unless_named),
]
