"""What one step costs, predicted or measured, as the run folder and the report know it. No torch."""

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Entry(BaseModel):
    """Base of everything in the folder."""

    model_config = ConfigDict(frozen=True, extra="allow")


class TransferCost(Entry):
    """One predicted Transfer: `calls` of `message_bytes` every `every` steps, and what rank 0 sends for it a step.

    even: whether all ranks send as much.
    """

    label: str
    axis: str
    op: str
    message_bytes: int
    calls: int
    every: int
    wire_bytes_per_step: Number
    seconds: Number = math.nan
    even: bool = True


class LinkLoad(Entry):
    """Bytes that cross one directed link in a step, headers not counted, and the seconds they keep it busy."""

    source: str
    target: str
    bytes_per_step: Number
    busy_s: Number
    axes: dict[str, Number] = {}
    """The bytes by the axis of the layout for which they travel."""


class Pass(Entry):
    """One pass of a micro-batch through a stage of a pipeline, on `rank`: F forward, B backward, I backward of inputs only, W of
    weights only. Seconds since the step began there."""

    rank: int
    kind: str
    stage: int
    micro: int
    begin_s: Number
    end_s: Number


class StepCost(Entry):
    """predicted.json and measured.json: one step in seconds and in bytes sent by one rank."""

    step_s: Number
    compute_s: Number = math.nan
    exposed_s: Number = math.nan
    waiting_s: Number = math.nan
    optimizer_s: Number = math.nan
    host_s: Number = math.nan
    """Of a device: it had nothing to do. The other parts are then those of its stream."""
    tokens_per_s: Number = math.nan
    wire_bytes_per_step: Number = math.nan
    assumptions: tuple[str, ...] = ()
    transfers: tuple[TransferCost, ...] = ()
    links: tuple[LinkLoad, ...] = ()
    passes: tuple[Pass, ...] = ()
    """Of the pipeline of rank 0; measured: in the last step."""
    missed_pace: float | None = None
    """Paced runs: how much longer than declared compute took, as a fraction, on the rank where it was most."""
