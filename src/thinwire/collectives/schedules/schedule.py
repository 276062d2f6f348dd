"""A schedule: which rank sends which chunks to whom, reduced or copied there, in which step. Plain data.

The blocks of the op (`ops`) are cut into chunks. A chunk has an integer weight; chunk i of a block of m elements covers

    [ floor(m s_i / W), floor(m s_(i+1) / W) )      s_i = sum of the weights before i in this block, W = sum of all of them

so chunks tile their block exactly whatever m is, and a chunk may be empty; nobody sends a message without elements.

Every rank has one slot per chunk. At first it holds the rank's own contribution, or nothing. In each step

    1. every message takes the values that the slots of its source hold now,
    2. then each rank applies the messages that it gets, in the order in which the step lists them:
       reduce   slot <- slot + received        copy   slot <- received

Steps order what happens on one rank; they are no barriers. What must wait for what follows from the slots (`program`). The order
in which contributions are added is thereby part of the schedule: results are the same bits in every run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from thinwire.collectives.schedules import ops
from thinwire.errors import UserError


@dataclass(frozen=True, slots=True)
class Chunk:
    """A share of a block: `weight` out of the sum of weights of all chunks of this block."""

    block: int
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Message:
    """`chunks` (numbers, ascending) travel together from `source` to `target`; reduce: added to what is there, else copied."""

    source: int
    target: int
    chunks: tuple[int, ...]
    reduce: bool = False


Step = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """See the top of the file. `p` ranks; `root` for the ops that have one; chunks are sorted by block, and no block has none."""

    op: str
    p: int
    chunks: tuple[Chunk, ...]
    steps: tuple[Step, ...]
    name: str
    root: int | None = None

    def __post_init__(self) -> None:
        if self.op not in ops.OPS:
            raise UserError(f"unknown collective {self.op!r}; schedules know: {', '.join(ops.OPS)}")
        if self.p < 1:
            raise UserError(f"{self.name}: p = {self.p}; a schedule needs 1 rank or more")
        if ops.rooted(self.op) != (self.root is not None):
            raise UserError(f"{self.name}: root = {self.root}; {self.op} {'needs one' if self.root is None else 'has none'}")
        if self.root is not None and not 0 <= self.root < self.p:
            raise UserError(f"{self.name}: root = {self.root}, but ranks are 0 to {self.p - 1}")
        self._check_chunks()
        for number, step in enumerate(self.steps):
            for message in step:
                self._check(message, f"{self.name}: step {number}: {message.source} -> {message.target}")

    def _check_chunks(self) -> None:
        blocks = [block for block, _ in groupby(chunk.block for chunk in self.chunks)]
        if blocks != list(range(ops.num_blocks(self.op, self.p))):
            raise UserError(
                f"{self.name}: chunks must be sorted by block, and cover blocks 0 to {ops.num_blocks(self.op, self.p) - 1}"
            )
        light = next((number for number, chunk in enumerate(self.chunks) if chunk.weight < 1), None)
        if light is not None:
            raise UserError(f"{self.name}: chunk {light} has weight {self.chunks[light].weight}; it must be 1 or more")

    def _check(self, message: Message, where: str) -> None:
        if not (0 <= message.source < self.p and 0 <= message.target < self.p) or message.source == message.target:
            raise UserError(f"{where}: a message joins two different ranks of 0 to {self.p - 1}")
        ascending = all(a < b for a, b in pairwise(message.chunks))
        if not message.chunks or not ascending or message.chunks[0] < 0 or message.chunks[-1] >= len(self.chunks):
            raise UserError(
                f"{where}: chunks {list(message.chunks)}; a message carries one or more of 0 to {len(self.chunks) - 1}, ascending"
            )

    @property
    def messages(self) -> tuple[Message, ...]:
        """All of them, in order. The place in this list is the number of a message."""
        return tuple(message for step in self.steps for message in step)

    def block_sizes(self, n: int) -> tuple[int, ...]:
        """Elements of each block for a message of n elements; see `ops.block_sizes`."""
        return ops.block_sizes(self.op, self.p, n)

    def ranges(self, sizes: Sequence[int]) -> tuple[range, ...]:
        """The elements of its block that each chunk covers, block b having sizes[b] of them."""
        if len(sizes) != ops.num_blocks(self.op, self.p) or min(sizes) < 0:
            raise UserError(
                f"{self.name}: {len(sizes)} sizes {list(sizes)[:8]}; {self.op} among {self.p} ranks needs one per block"
            )
        result: list[range] = []
        for block, chunks in groupby(self.chunks, lambda chunk: chunk.block):
            sums = list(accumulate((chunk.weight for chunk in chunks), initial=0))
            result += [range(*(sizes[block] * weight // sums[-1] for weight in ends)) for ends in pairwise(sums)]
        return tuple(result)

    def flows(self, sizes: Sequence[int], item_bytes: int = 1) -> tuple[tuple[int, int, int], ...]:
        """(source, target, payload bytes) of the whole schedule, once per pair that sends anything, sorted."""
        lengths = [len(one) * item_bytes for one in self.ranges(sizes)]
        total: Counter[tuple[int, int]] = Counter()
        for message in self.messages:
            total[message.source, message.target] += sum(lengths[chunk] for chunk in message.chunks)
        return tuple((source, target, size) for (source, target), size in sorted(total.items()) if size)


def whole_blocks(count: int) -> tuple[Chunk, ...]:
    """A chunk for each of `count` blocks."""
    return tuple(map(Chunk, range(count)))


def check_order(order: Sequence[int]) -> tuple[int, ...]:
    """`order` as a tuple; UserError unless it names each of the ranks 0 to p-1 once."""
    if sorted(order) != list(range(len(order))) or not order:
        raise UserError(f"the order {list(order)} must name each rank from 0 to {max(len(order) - 1, 0)} once")
    return tuple(order)
