"""Assigning micro-batches: the best split of all, each micro-batch to one rank, and no change for noise."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.train.assign import GAIN, assign, first_assignment, index_in_step, reassign, slowest_s
from thinwire.train.checkpoint.files import Progress, read_progress

SECONDS = st.floats(1e-4, 1e3)


def all_splits(total: int, ranks: int) -> Iterator[tuple[int, ...]]:
    if ranks == 1:
        yield (total,)
        return
    for first in range(1, total - ranks + 2):
        for rest in all_splits(total - first, ranks - 1):
            yield (first, *rest)


@given(seconds=st.lists(SECONDS, min_size=1, max_size=4), more=st.integers(0, 8))
def test_no_other_split_is_faster(seconds: list[float], more: int) -> None:
    total = len(seconds) + more
    best = min(max(n * s for n, s in zip(split, seconds, strict=True)) for split in all_splits(total, len(seconds)))
    assert slowest_s(assign(total, seconds), seconds) == best


@given(seconds=st.lists(SECONDS, min_size=1, max_size=40), more=st.integers(0, 200))
def test_everything_is_assigned_and_faster_ranks_get_no_less(seconds: list[float], more: int) -> None:
    counts = assign(len(seconds) + more, seconds)
    assert sum(counts) == len(seconds) + more and min(counts) >= 1
    by_speed = sorted(zip(seconds, counts, strict=True), key=lambda pair: (pair[0], -pair[1]))
    assert [count for _, count in by_speed] == sorted(counts, reverse=True)


@given(ranks=st.integers(1, 12), accumulate=st.integers(1, 9), seconds=SECONDS)
def test_equal_ranks_get_as_many(ranks: int, accumulate: int, seconds: float) -> None:
    assert assign(ranks * accumulate, [seconds] * ranks) == (accumulate,) * ranks


@pytest.mark.parametrize(
    ("total", "counts", "longer"), [(14, (4, 4, 4, 2), 8 / 7), (16, (5, 5, 4, 2), 5 / 4), (28, (8, 8, 8, 4), 8 / 7)]
)
def test_half_the_speed_gets_half_of_the_work(total: int, counts: tuple[int, ...], longer: float) -> None:
    assert assign(total, [1, 1, 1, 2]) == counts
    assert slowest_s(counts, [1, 1, 1, 2]) / (total / 4) == pytest.approx(longer)


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_each_micro_batch_belongs_to_one_rank(counts: list[int]) -> None:
    assignment = tuple(counts)
    places = [index_in_step(assignment, rank, micro) for rank, count in enumerate(assignment) for micro in range(count)]
    assert sorted(places) == list(range(sum(assignment)))


@given(ranks=st.integers(1, 6), accumulate=st.integers(1, 5))
def test_equal_counts_are_rounds_of_all_ranks(ranks: int, accumulate: int) -> None:
    assignment = (accumulate,) * ranks
    for rank in range(ranks):
        assert [index_in_step(assignment, rank, micro) for micro in range(accumulate)] == list(
            range(rank, ranks * accumulate, ranks)
        )


@given(seconds=st.lists(SECONDS, min_size=2, max_size=6), accumulate=st.integers(1, 6))
def test_a_new_assignment_pays_and_the_next_look_changes_nothing(seconds: list[float], accumulate: int) -> None:
    before = (accumulate,) * len(seconds)
    after = reassign(before, seconds)
    assert after == before or slowest_s(after, seconds) < (1 - GAIN) * slowest_s(before, seconds)
    assert reassign(after, seconds) == after


def test_noise_below_the_gain_changes_nothing() -> None:
    counts = (100, 100)  # two micro-batches of 200 could go over, and would save 1 %
    assert assign(200, [1.0, 1.02]) != counts and reassign(counts, [1.0, 1.02]) == counts


def test_a_saved_assignment_goes_on_where_it_fits() -> None:
    assert first_assignment((2, 2), [1, 1], saved=(3, 1)) == (3, 1)
    assert first_assignment((2, 2), [1, 3], saved=()) == (3, 1)
    assert first_assignment((2, 2, 2), [1, 1, 1], saved=(3, 1)) == (2, 2, 2), "other ranks"
    assert first_assignment((4, 4), [1, 1], saved=(3, 1)) == (4, 4), "other micro-batches"


def test_checkpoints_of_the_old_name_are_read(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"step": 6, "tokens": 96, "world_size": 2, "deal": [3, 1]}')
    assert read_progress(tmp_path) == Progress(step=6, tokens=96, world_size=2, assignment=(3, 1))
