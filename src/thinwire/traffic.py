"""Transfer: one kind of message of a training run.

Synchronisers predict Transfers; collectives turn them into wire bytes and seconds; the planner adds these up.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

PIPELINE = "pipeline"
"""Label of what the stages of a pipeline hand on during the passes of a step."""
REPLICAS = "replicas"
"""Ends labels of what replicas average of the gradients of one unit, while others are still computed."""
EVALUATION = "evaluation passes"
"""Label of all that passes without gradients send; no part of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One kind of message that training hands to a collective.

    label          what it carries: "bucket 0", "loss", "boundary 1-2"
    axis           the mesh axis over which it runs
    op             the collective: "all_reduce", "broadcast", "send", ...
    message_bytes  what each rank hands to the op in one call
    item_bytes     of one number in it; a collective cuts no number in two
    calls          calls per event
    around         of a send: each rank of the group sends to the next one, the last to the first; else one rank sends
    every          optimizer steps between events (1: each step)
    event          the same for rare transfers that follow one another and hide under the same compute; "": alone
    window_flops   compute that is still to run when the message is ready and under which it may hide, in flops of one
                   rank; 0: a rank waits at once
    work_s         seconds of one rank's processor that belong to one call, before or after it: coding and decoding
    in_passes      whether forward and backward passes stand still for what of each call does not hide under its window; what may
                   hide under other compute does not hide under it
    """

    label: str
    axis: str
    op: str
    message_bytes: int
    item_bytes: int = 4
    calls: int = 1
    every: int = 1
    event: str = ""
    window_flops: float = 0.0
    work_s: float = 0.0
    around: bool = False
    in_passes: bool = False


def merged(transfers: Iterable[Transfer]) -> list[Transfer]:
    """Those that differ in `calls` only as one, in the order of the first of each."""
    calls = Counter[Transfer]()
    for transfer in transfers:
        calls[replace(transfer, calls=0)] += transfer.calls
    return [replace(transfer, calls=count) for transfer, count in calls.items()]
