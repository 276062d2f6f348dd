"""The proof refuses what is wrong: what is dropped, sent twice or elsewhere, added in another order; and waiting in circles."""

from dataclasses import replace
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from all_schedules import GENERATORS, make
from execute_numpy import execute, input_lengths, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from message_parts import scratch

from thinwire.collectives.schedules import bruck, direct, doubling, hierarchy, ring, rooted
from thinwire.collectives.schedules.combine import pipelined, then, together
from thinwire.collectives.schedules.program import Program, programs
from thinwire.collectives.schedules.schedule import Chunk, Message, Schedule
from thinwire.collectives.schedules.verify import check_progress, verify
from thinwire.errors import UserError

seeds = st.integers(0, 10**6)
ALWAYS_WRONG = ["drop", "drop one chunk", "twice in a step", "again in the next step", "again at the end", "other kind"]
OFTEN_WRONG = ["other target", "other source", "later", "swap steps"]


def mutated(schedule: Schedule, how: str, random: Random) -> Schedule:
    """The schedule with one message (or two steps) changed."""
    steps = [list(step) for step in schedule.steps]
    at = random.choice([number for number, step in enumerate(steps) if step])
    place = random.randrange(len(steps[at]))
    message = steps[at][place]
    others = [rank for rank in range(schedule.p) if rank not in (message.source, message.target)]
    match how:
        case "drop":
            del steps[at][place]
        case "drop one chunk":
            left = message.chunks[:-1] if random.random() < 0.5 else message.chunks[1:]
            steps[at][place : place + 1] = [replace(message, chunks=left)] if left else []
        case "twice in a step":
            steps[at].append(message)
        case "again in the next step":
            steps.insert(at + 1, [message])
        case "again at the end":
            steps.append([message])
        case "other kind":
            steps[at][place] = replace(message, reduce=not message.reduce)
        case "other target":
            steps[at][place] = replace(message, target=random.choice(others))
        case "other source":
            steps[at][place] = replace(message, source=random.choice(others))
        case "later":
            del steps[at][place]
            steps.insert(random.randint(at + 1, len(steps)), [message])
        case _:
            other = random.randrange(len(steps))
            steps[at], steps[other] = steps[other], steps[at]
    return replace(schedule, steps=tuple(tuple(step) for step in steps))


@pytest.mark.parametrize("name", GENERATORS)
@settings(max_examples=6)
@given(p=st.integers(2, 9), seed=seeds, how=st.sampled_from(ALWAYS_WRONG), segments=st.integers(1, 2))
def test_what_is_dropped_or_sent_twice_or_of_another_kind_is_refused(
    name: str, p: int, seed: int, how: str, segments: int
) -> None:
    schedule = make(name, p, seed, segments)
    verify(schedule)
    with pytest.raises(UserError) as raised:
        verify(mutated(schedule, how, Random(seed)))
    assert "\n" not in str(raised.value) and str(raised.value).startswith(schedule.name)


@pytest.mark.parametrize("name", [name for name in GENERATORS if "reduce" not in name and "reduce" not in make(name, 3, 0).op])
@settings(max_examples=10)
@given(p=st.integers(3, 11), seed=seeds)
def test_a_copy_to_another_rank_is_refused(name: str, p: int, seed: int) -> None:
    with pytest.raises(UserError):
        verify(mutated(make(name, p, seed), "other target", Random(seed)))


@pytest.mark.parametrize("name", GENERATORS)
@settings(max_examples=10)
@given(p=st.integers(3, 6), seed=seeds, how=st.sampled_from(OFTEN_WRONG), segments=st.integers(1, 2))
def test_what_is_accepted_is_right(name: str, p: int, seed: int, how: str, segments: int) -> None:
    """A sum may well be added up in another order. Then `verify` may accept it, but only if the result is right."""
    schedule = mutated(make(name, p, seed, segments), how, Random(seed))
    try:
        verify(schedule)
    except UserError:
        return
    sizes = list(schedule.block_sizes(3 * p))
    generator = np.random.default_rng(seed)
    inputs = [generator.integers(-1000, 1000, length) for length in input_lengths(schedule.op, p, sizes, schedule.root)]
    for got, wanted in zip(execute(schedule, inputs, sizes, seed), plain(schedule.op, inputs, sizes, schedule.root), strict=True):
        assert wanted is None or np.array_equal(got, wanted)


def test_about_half_of_such_changes_are_refused() -> None:
    """Counted, so that the law above says something."""
    refused = 0
    for seed in range(200):
        try:
            verify(mutated(make("ring all_reduce", 5, seed), OFTEN_WRONG[seed % 4], Random(seed)))
        except UserError:
            refused += 1
    assert 100 <= refused < 200


def steps(*each: list[Message]) -> tuple[tuple[Message, ...], ...]:
    return tuple(map(tuple, each))


ALL_REDUCE = Schedule(op="all_reduce", p=3, chunks=(Chunk(0),), steps=(), name="any")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (replace(ALL_REDUCE, steps=()), "rank 0 ends without the contributions of ranks 1, 2"),
        (
            replace(ALL_REDUCE, steps=steps([Message(a, b, (0,), True) for a in range(3) for b in range(3) if a != b])),
            "in different orders",
        ),
        (
            replace(ALL_REDUCE, steps=steps([Message(0, 1, (0,), True)], [Message(1, 0, (0,), True)])),
            "rank 0 would be added twice",
        ),
        (replace(ALL_REDUCE, steps=steps([Message(0, 1, (0,))])), "overwrite the contributions of rank 1"),
        (replace(ALL_REDUCE, op="broadcast", root=0, steps=steps([Message(1, 2, (0,))])), "does not hold it yet"),
        (replace(ALL_REDUCE, op="broadcast", root=0, steps=steps([Message(0, 1, (0,), True)])), "empty slot"),
        (replace(ALL_REDUCE, op="broadcast", root=0, steps=steps([Message(0, 1, (0,))] * 2)), "holds it already"),
        (
            replace(
                ALL_REDUCE,
                steps=steps(
                    [Message(0, 2, (0,), True), Message(1, 2, (0,), True), Message(1, 0, (0,), True)],
                    [Message(2, 0, (0,)), Message(2, 1, (0,))],
                ),
            ),
            "2 -> 0, chunk 0: the copy overwrites what was received there and never used",
        ),
        (
            replace(ALL_REDUCE, op="reduce", root=0, steps=steps([Message(2, 1, (0,), True), Message(2, 0, (0,), True)])),
            "rank 0 ends without the contributions of rank 1",
        ),
        (
            Schedule(
                op="gather",
                p=3,
                root=0,
                chunks=(Chunk(0), Chunk(1), Chunk(2)),
                steps=steps([Message(1, 0, (1,)), Message(2, 0, (2,)), Message(1, 2, (1,))]),
                name="any",
            ),
            "rank 2 is sent chunk 1 in vain",
        ),
    ],
)
def test_the_first_violation_is_named(wrong: Schedule, words: str) -> None:
    with pytest.raises(UserError, match=words):
        verify(wrong)


def one_at_a_time(program: Program) -> Program:
    """The same program, each action a step of its own: sends are waited for before anything is received."""
    return tuple(replace(action, step=place) for place, action in enumerate(program))


@given(p=st.integers(2, 17))
def test_a_ring_in_which_all_wait_for_their_sends_first_is_a_deadlock(p: int) -> None:
    everyone = programs(ring.all_gather(range(p)))
    check_progress(everyone, "ring")
    with pytest.raises(UserError, match=r"ring: deadlock: ranks \[0, 1"):
        check_progress([one_at_a_time(program) for program in everyone], "ring")


@given(p=st.integers(2, 17), seed=seeds)
def test_a_tree_never_deadlocks_even_one_action_at_a_time(p: int, seed: int) -> None:
    check_progress([one_at_a_time(program) for program in programs(make("tree all_reduce", p, seed))], "tree")


def test_ranks_that_disagree_about_their_messages_are_named() -> None:
    everyone = programs(ring.all_gather(range(3)))
    with pytest.raises(UserError, match="what rank 0 sends to 1 is not what 1 receives"):
        check_progress([everyone[0], everyone[1][:-1], everyone[2]], "ring")


@settings(max_examples=12)
@given(p=st.integers(2, 12), k=st.integers(1, 5))
def test_scratch_memory(p: int, k: int) -> None:
    """In parts of the message; worked out by hand for each."""

    def most(schedule: Schedule) -> Fraction:
        return max(scratch(schedule, rank) for rank in range(schedule.p))

    assert most(ring.all_reduce(range(p))) == Fraction(1, p)  # the one chunk that lands
    assert most(ring.reduce_scatter(range(p))) == Fraction(min(2, p - 1), p)  # and the one that leaves
    assert most(ring.all_gather(range(p))) == most(direct.pairwise(p)) == 0  # all land where they belong
    assert most(direct.reduce_scatter(p)) == Fraction(p - 1, p)
    assert most(pipelined(direct.all_reduce(p), k)) == Fraction(p - 1, p * k)
    assert most(doubling.recursive_doubling(p)) == 1
    assert most(rooted.broadcast(rooted.binomial(p))) == 0
    assert most(pipelined(rooted.reduce(rooted.chain(range(p))), k)) == Fraction(min(2, p - 1, k) if p > 2 else 1, k)
    assert most(pipelined(hierarchy.all_reduce([range(p)]), k)) <= Fraction(1, p)


def test_what_a_schedule_costs_in_messages() -> None:
    schedule = bruck.all_to_all(8)
    assert (len(schedule.steps), len(schedule.messages), max(map(len, programs(schedule)))) == (3, 24, 6)
    assert scratch(ring.all_reduce([0]), 0) == 0


def test_parts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(UserError, match="do not make one collective"):
        then(ring.reduce_scatter(range(3)), ring.all_gather(range(4)), "any")
    with pytest.raises(UserError, match="one number of ranks"):
        together([ring.all_gather(range(3)), ring.all_gather(range(4))], "any")
    with pytest.raises(UserError, match="shares"):
        direct.all_reduce(3, [0, 0, 0])
    with pytest.raises(UserError, match="segments = 0"):
        pipelined(ring.all_reduce(range(3)), 0)
    with pytest.raises(UserError, match="must name each rank"):
        ring.all_reduce([0, 2])
    with pytest.raises(UserError, match="not a tree"):
        rooted.broadcast([1, 0, -1])
    with pytest.raises(UserError, match="racks"):
        hierarchy.all_reduce([[0, 1], []])
    with pytest.raises(UserError, match="servers"):
        direct.parameter_server(3, [3])
