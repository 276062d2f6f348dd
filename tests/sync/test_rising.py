"""Exchanges that are dense at first and rare later: sent as predicted in each part, bit-equal, resumed as uninterrupted."""

from itertools import pairwise

import pytest
import torch
from cases import long
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from replica_loop import run
from replicas_reference import STEPS

from pool import Pool
from thinwire.config.compress import Coded
from thinwire.config.sync import DiLoCo, MuLoCo, SparseLoCo, Streaming, Sync
from thinwire.sync.local_steps import Schedule, due

FIRST = ((4, 2),)
RISING: dict[str, Sync] = {
    "diloco": DiLoCo(every=3, first=FIRST),
    "streaming": Streaming(every=3, layers_per_fragment=1, overlap=1, first=FIRST),
    "sparseloco": SparseLoCo(every=6, first=((2, 1), (2, 2))),
    "muloco": MuLoCo(every=3, first=FIRST),
}
INT4 = Coded(kind="int4", exclude=(), vectors=True)


@pytest.mark.parametrize("kind", ["streaming", "sparseloco", long("diloco"), long("muloco")])
def test_sends_what_was_predicted_for_each_part(ranks2: Pool, kind: str) -> None:
    config = RISING[kind]
    results = ranks2.run(run, config, INT4, 1, 0, STEPS, None)
    expected = {}
    for steps, phase in config.phases(STEPS):
        (alone, _) = ranks2.run(run, phase, INT4, 1, 0, 0, None)
        tail = f" every {phase.every}" if phase.every < config.every else ""
        for label, op, message_bytes, axis, every in alone["predicted"]:
            fragment, number, *rest = label.split(" ")
            name = " ".join([fragment, number + tail, *rest])
            expected[name, op, message_bytes, axis] = steps // every
    measured = {row: calls for row, (calls, _) in results[0]["sent"].items()}
    assert measured == expected
    assert all(torch.equal(one["final"], results[0]["final"]) for one in results)


@pytest.mark.parametrize(("kind", "stop"), [("streaming", 3), long("streaming", 4), long("sparseloco", 3), long("diloco", 7)])
def test_resumed_equals_uninterrupted_bit_for_bit(ranks2: Pool, kind: str, stop: int) -> None:
    """Among the first steps, with a fragment under way; where one part ends; later."""
    whole = ranks2.run(run, RISING[kind], INT4, 1, 0, STEPS, None)
    cut = ranks2.run(run, RISING[kind], INT4, 1, 0, stop, None)
    resumed = ranks2.run(run, RISING[kind], INT4, 1, stop, STEPS, [one["state"] for one in cut])
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("local", "final"))


def test_the_same_period_at_first_changes_nothing(ranks2: Pool) -> None:
    plain = ranks2.run(run, DiLoCo(every=2), INT4, 1, 0, STEPS, None)
    same = ranks2.run(run, DiLoCo(every=2, first=((4, 2), (2, 2))), INT4, 1, 0, STEPS, None)
    assert all(torch.equal(one["final"], other["final"]) for one, other in zip(plain, same, strict=True))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), max_size=3), st.integers(1, 20), st.integers(1, 9))
def test_each_fragment_is_sent_once_in_each_period(first: list[tuple[int, int]], every: int, count: int) -> None:
    """first: (periods, H)."""
    schedule = Schedule(every=every, first=tuple((periods * h, h) for periods, h in first))
    lasts = schedule.first_steps + 2 * every
    ends = [*(h for periods, h in first for _ in range(periods)), every, every]
    for fragment in range(count):
        times = [done for done in range(1, lasts + 1) if due(fragment, count, *schedule.period(done))]
        starts = [sum(ends[:number]) for number in range(len(ends) + 1)]
        assert [sum(a < done <= b for done in times) for a, b in pairwise(starts)] == [1] * len(ends)


def test_parts_that_are_no_whole_periods_are_refused() -> None:
    with pytest.raises(ValidationError, match="first = 5 steps every 2: that is no number of whole periods"):
        DiLoCo(first=((5, 2),))
    with pytest.raises(ValidationError, match="overlap = 2 must be less than every = 2"):
        Streaming(every=30, overlap=2, first=((4, 2),))
    assert DiLoCo(every=30, first=((4, 2),)).phases(3) == [(3, DiLoCo(every=2)), (0, DiLoCo(every=30))]
