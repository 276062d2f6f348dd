"""Laws of schedules: each computes its op, whatever the number of ranks and the sizes, in any order of events that is allowed."""

from collections import Counter
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from all_schedules import GENERATORS, make
from execute_numpy import execute, input_lengths, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from message_parts import fractions

from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.schedule import Chunk, Message, Schedule
from thinwire.collectives.schedules.table import from_json, to_json, to_text
from thinwire.collectives.schedules.verify import verify
from thinwire.errors import UserError

seeds = st.integers(0, 10**6)


@pytest.mark.parametrize("name", GENERATORS)
@settings(max_examples=6)
@given(p=st.integers(1, 17), seed=seeds, segments=st.integers(1, 3), even=st.booleans(), numbers=st.integers(0, 60))
def test_a_schedule_computes_its_op(name: str, p: int, seed: int, segments: int, even: bool, numbers: int) -> None:
    """p from 1 to 17, sizes equal or not, many of them 0; ranks run in a random order."""
    schedule, random = make(name, p, seed, segments), Random(seed)
    verify(schedule)
    count = ops.num_blocks(schedule.op, p)
    sizes = list(schedule.block_sizes(numbers)) if even else [random.choice([0, 0, 1, 2, 7, numbers]) for _ in range(count)]
    generator = np.random.default_rng(seed)
    lengths = input_lengths(schedule.op, p, sizes, schedule.root)
    inputs = [generator.integers(-1000, 1000, length) for length in lengths]
    outputs = execute(schedule, inputs, sizes, seed)
    for got, wanted in zip(outputs, plain(schedule.op, inputs, sizes, schedule.root), strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or np.array_equal(got, wanted)


@pytest.mark.parametrize("name", GENERATORS)
@settings(max_examples=3)
@given(p=st.integers(2, 12), seed=seeds)
def test_results_are_the_same_bits_on_all_ranks_and_in_any_order_of_events(name: str, p: int, seed: int) -> None:
    schedule = make(name, p, seed, 2)
    generator = np.random.default_rng(seed)
    sizes = list(schedule.block_sizes(37))
    inputs = [generator.standard_normal(n).astype(np.float32) for n in input_lengths(schedule.op, p, sizes, schedule.root)]
    first, second = (execute(schedule, inputs, sizes, order) for order in (seed, seed + 1))
    assert [None if one is None else one.tobytes() for one in first] == [None if one is None else one.tobytes() for one in second]
    if schedule.op == "all_reduce":
        assert len({one.tobytes() for one in first if one is not None}) == 1


@pytest.mark.parametrize("name", GENERATORS)
@settings(max_examples=3)
@given(p=st.integers(1, 9), seed=seeds, segments=st.integers(1, 2))
def test_stored_and_read_again_it_is_the_same(name: str, p: int, seed: int, segments: int) -> None:
    schedule = make(name, p, seed, segments)
    assert from_json(to_json(schedule)) == schedule
    lines = to_text(schedule).splitlines()
    assert len(lines) == 2 + len(schedule.steps)
    assert sum(line.count(">") for line in lines[2:]) == len(schedule.messages)


@given(sizes=st.lists(st.integers(0, 50), min_size=3, max_size=3), weights=st.lists(st.integers(1, 9), min_size=3, max_size=9))
def test_chunks_tile_their_blocks(sizes: list[int], weights: list[int]) -> None:
    blocks = sorted(place % 3 for place in range(len(weights)))
    chunks = tuple(Chunk(block, weight) for block, weight in zip(blocks, weights, strict=True))
    schedule = Schedule(op="all_gather", p=3, chunks=chunks, steps=(), name="any")
    ranges = schedule.ranges(sizes)
    for block, size in enumerate(sizes):
        mine = [one for one, of in zip(ranges, blocks, strict=True) if of == block]
        assert mine[0].start == 0 and mine[-1].stop == size
        assert all(a.stop == b.start for a, b in pairwise(mine))
    assert sum(fractions(schedule)) == 3


@pytest.mark.parametrize("op", ops.OPS)
@given(p=st.integers(1, 17), n=st.integers(0, 100))
def test_blocks_of_a_message_are_as_even_as_can_be(op: str, p: int, n: int) -> None:
    sizes = ops.block_sizes(op, p, n)
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes[: ops.message_blocks(op, p)]) == n


def test_what_flows_is_what_the_ranges_say() -> None:
    """Ring of three, 10 elements of 4 bytes: parts of 3, 3, 4; each goes round twice but for one edge."""
    schedule = make("ring all_reduce", 3, 0)
    lengths = [3, 3, 4]
    flows = schedule.flows([10], 4)
    sent: Counter[tuple[int, int]] = Counter()
    for message in schedule.messages:
        sent[message.source, message.target] += 4 * lengths[message.chunks[0]]
    assert flows == tuple((source, target, size) for (source, target), size in sorted(sent.items()))
    assert sum(size for _, _, size in flows) == 2 * 2 * 40


def test_the_table_is_readable() -> None:
    table = to_text(make("Rabenseifner", 3, 4))
    assert table.splitlines()[0] == "Rabenseifner: all_reduce, 3 ranks, 2 chunks, 4 steps"
    direct = Schedule(op="broadcast", p=3, root=1, chunks=(Chunk(0),) * 4, steps=((Message(1, 0, (0, 1, 3)),),), name="some")
    assert to_text(direct).splitlines()[1:] == ["step  rank 0  rank 1   rank 2", "0     .       0-1,3>0  ."]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"op": "sum"}, "unknown collective"),
        ({"p": 0}, "needs 1 rank"),
        ({"root": 0}, "has none"),
        ({"chunks": (Chunk(0), Chunk(0, 0))}, "weight 0"),
        ({"chunks": (Chunk(1),)}, "cover blocks"),
        ({"steps": ((Message(0, 0, (0,)),),)}, "two different ranks"),
        ({"steps": ((Message(0, 2, (0,)),),)}, "two different ranks"),
        ({"steps": ((Message(0, 1, ()),),)}, "carries one or more"),
        ({"steps": ((Message(0, 1, (0, 0)),),)}, "carries one or more"),
        ({"steps": ((Message(0, 1, (7,)),),)}, "carries one or more"),
    ],
)
def test_a_malformed_schedule_is_one_line(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        Schedule(**{"op": "all_reduce", "p": 2, "chunks": (Chunk(0),), "steps": (), "name": "any"} | change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{}", '{"thinwire_schedule":1,"name":"a","op":"all_reduce","p":"two"}', "[1]"])
def test_what_is_no_stored_schedule_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a stored schedule"):
        from_json(text)
