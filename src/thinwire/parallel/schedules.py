"""Schedules of a pipeline, as PyTorch makes them: which rank computes what of which micro-batch in which order.

All run on PyTorch's runtime of actions, which posts a send as soon as its tensor is there and a receive as soon as the other side
sends, and waits for sends at the end of a step only: gpipe and 1f1b too, there with one stage a rank. (PyTorch's classes of these
names wait for a send before the next one, which on a thin link costs the time of the link.)
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import pipelining

from thinwire.errors import UserError
from thinwire.parallel.balance import stages_of

CLASSES: Mapping[str, Callable[..., Any]] = {
    "gpipe": pipelining.ScheduleLoopedBFS,
    "1f1b": pipelining.ScheduleInterleaved1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zb1p": pipelining.ScheduleInterleavedZeroBubble,
    "zbv": pipelining.ScheduleZBVZeroBubble,
    "dualpipev": pipelining.ScheduleDualPipeV,
}
KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}

Order = list[tuple[str, int, int]]
"""What one rank computes: (F forward, B backward, I backward of inputs, W of weights; stage; micro-batch)."""


def make_schedule(
    schedule: str, stages: Sequence[Any], num_micro: int, loss: Callable[[torch.Tensor, Any], torch.Tensor] | None
) -> Any:
    """PyTorch's schedule over this rank's stages. Losses are neither averaged nor divided. UserError for a number of
    micro-batches that it cannot take."""
    ranks = stages[0].group_size
    try:
        return CLASSES[schedule](list(stages), num_micro, loss_fn=loss, scale_grads=False)
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
    nearest = min(
        (count for count in range(1, 4 * num_micro + 4 * len(stages) * ranks) if _takes(schedule, stages, count)),
        key=lambda count: abs(count - num_micro),
        default=None,
    )
    raise UserError(
        f"pipeline.schedule = {schedule!r} over {ranks} ranks cannot run {num_micro} micro-batches ({reason[:150]}); "
        f"set sync.accumulate to {nearest}, or take '1f1b'"
    )


def orders(schedule: str, ranks: int, per_rank: int, num_micro: int) -> list[Order]:
    """What each rank computes, in order. No process group is needed. UserError as for `make_schedule`."""
    made = make_schedule(schedule, _placeholders(schedule, ranks, per_rank), num_micro, _no_loss)
    return [_flat(made.pipeline_order[rank]) for rank in range(ranks)]


@contextmanager
def without_log() -> Iterator[None]:
    """Around a step: where it fails, PyTorch logs the whole schedule before it raises what has happened."""
    logger = logging.getLogger(pipelining.schedules.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def arrivals(made: Any, rank: int) -> list[tuple[str, int, int]]:
    """What arrives at `rank` in a step of the schedule that `make_schedule` has made: (F activation or B gradient, the stage that
    gets it, micro-batch), of each sender in the order in which it sends. Empty for a schedule that does not say."""
    places = made.stage_index_to_group_rank if hasattr(made, "pipeline_order_with_comms") else {}
    found = []
    for sender, actions in getattr(made, "pipeline_order_with_comms", {}).items():
        for one in actions if sender != rank else ():
            kind = one.computation_type.name
            if kind in ("SEND_F", "SEND_B"):
                stage = one.stage_index + (1 if kind == "SEND_F" else -1)
                if places[stage] == rank:
                    found.append((kind[-1], stage, one.microbatch_index))
    return found


def _placeholders(schedule: str, ranks: int, per_rank: int) -> list[SimpleNamespace]:
    """In the place of a first rank's stages, as far as schedules ask for them when they are made."""
    stages = ranks * per_rank
    return [
        SimpleNamespace(
            num_stages=stages,
            group_size=ranks,
            group_rank=0,
            stage_index=index,
            is_first=index == 0,
            is_last=index == stages - 1,
            stage_index_to_group_rank={},
            submod=torch.nn.Identity(),
        )
        for index in stages_of(schedule, ranks, per_rank, 0)
    ]


def _takes(schedule: str, stages: Sequence[Any], num_micro: int) -> bool:
    placeholders = _placeholders(schedule, stages[0].group_size, len(stages))
    try:
        CLASSES[schedule](placeholders, num_micro, loss_fn=_no_loss)
    except (ValueError, RuntimeError, AssertionError):
        return False
    return True


def _no_loss(output: torch.Tensor, target: Any) -> torch.Tensor:
    return output


def _flat(actions: Sequence[Any]) -> Order:
    """Without bubbles; of two that overlap, one after the other."""
    found: Order = []
    for action in actions:
        for one in () if action is None else action.sub_actions or (action,):
            if (kind := KINDS.get(one.computation_type.name)) is not None:
                found.append((kind, one.stage_index, one.microbatch_index))
    return found
