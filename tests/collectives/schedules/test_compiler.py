"""Compiled programs compute what the schedule says, bit for bit, on a network that stores nothing, with little memory or much."""

from random import Random

import numpy as np
import pytest
from all_schedules import GENERATORS, make
from execute_numpy import execute, input_lengths
from hypothesis import given, settings
from hypothesis import strategies as st
from message_parts import fractions, scratch
from rendezvous import run

from thinwire.collectives.run import compiler
from thinwire.collectives.schedules import ops

MEMORIES = [(16, 1 << 20), (1, 0), (3, 20), (0, 1 << 20), (0, 0)]
"""Messages expected ahead of time, and spare scratch memory. ahead = 0: where messages have no tags."""


@pytest.mark.parametrize("name", GENERATORS)
@settings(max_examples=5)
@given(memory=st.sampled_from(MEMORIES), p=st.integers(1, 9), seed=st.integers(0, 10**6), segments=st.integers(1, 3))
def test_a_compiled_schedule_computes_what_the_schedule_says(
    name: str, memory: tuple[int, int], p: int, seed: int, segments: int
) -> None:
    check(name, *memory, p, seed, segments)


@pytest.mark.long
@pytest.mark.parametrize("ahead, spare", MEMORIES)
@pytest.mark.parametrize("name", GENERATORS)
@settings(max_examples=6)
@given(p=st.integers(1, 13), seed=st.integers(0, 10**6), segments=st.integers(1, 4))
def test_it_does_so_with_every_memory_among_more_ranks(
    name: str, ahead: int, spare: int, p: int, seed: int, segments: int
) -> None:
    check(name, ahead, spare, p, seed, segments)


def check(name: str, ahead: int, spare: int, p: int, seed: int, segments: int) -> None:
    schedule, random = make(name, p, seed, segments), Random(seed)
    sizes = [random.choice([0, 1, 2, 7, random.randint(0, 90)]) for _ in range(ops.num_blocks(schedule.op, p))]
    generator = np.random.default_rng(seed)
    inputs = [generator.standard_normal(n).astype(np.float32) for n in input_lengths(schedule.op, p, sizes, schedule.root)]
    wanted = execute(schedule, inputs, sizes, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "SPARE", spare)
        got = run(schedule, inputs, sizes, seed, ahead)
    for one, other in zip(got, wanted, strict=True):
        assert (None if one is None else one.tobytes()) == (None if other is None else other.tobytes())


@pytest.mark.parametrize("segments", [1, 7])
@pytest.mark.parametrize("name", ["ring all_reduce", "weighted direct", "double binary tree", "parameter server", "Rabenseifner"])
def test_scratch_memory_is_bounded(name: str, segments: int) -> None:
    """By what the schedule needs and the window of expected messages, not by the length of the schedule."""
    n = 1 << 26
    schedule = make(name, 8, 1, segments)
    part = fractions(schedule)
    for rank in range(8):
        longest = max(sum(part[c] for c in m.chunks) for m in schedule.messages if m.target == rank)
        most = (
            2 * (scratch(schedule, rank) + compiler.AHEAD * longest) * n + compiler.SPARE
        )  # 2: pieces of different lengths leave gaps
        assert compiler.compile_for(schedule, rank, [n]).lengths[2] <= most
