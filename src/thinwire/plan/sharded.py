"""The passes of a step whose ranks share out the states, simulated: what of gathering and reducing hides under compute. No torch.

A rank computes, and has a lane of gathers, one of reductions and one of averages between replicas; each lane works on one message
after the other. While several do, each goes as much slower, for they share the links; averages do so only if their narrowest link
is one of the others'. In the order of the passes (units: the root, then the blocks):

    forward     root gathered; at each unit, when its weights are there, the next two are asked for; then it computes
    backward    the root's head computes first; at each unit the one before is asked for when its own weights are there ("always")
                behind a unit's last backward pass its gradients are reduced, and then averaged, while at most two wait;
                the end is when all are
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from thinwire.traffic import REPLICAS, Transfer
from thinwire.workload import BACKWARD_OVER_FORWARD, Workload

PREFETCH, UNDER_WAY = 2, 2
"""Units asked for ahead in the forward pass, and under way to be reduced, as `compress_sharded` does."""
GATHERED_BLOCKS, SENT_AT_ONCE = 3, 3
"""Blocks with whole weights at once, and copies of the largest unit on its way."""
FRAGMENTS, MAPPED_BYTES = 2, 32 * 2**20
"""Of blocks up to this size, which come and go, glibc keeps room for so many times as many: it maps what is larger. A rank that
needs 480 MB takes 590, and 480 with a fixed M_MMAP_THRESHOLD, measured."""
WEIGHTS, GRADIENTS = "weights", "gradients"


@dataclass(frozen=True, kw_only=True)
class ShardedPasses:
    """Of one rank. weights, gradients: what is sent for each unit, the root first, in one call; head_flops, block_flops and
    block_again: of a micro-batch, forward and computed again in the backward pass. reshards: the blocks, behind each pass."""

    weights: Sequence[Transfer]
    gradients: Sequence[Transfer]
    head_flops: float
    block_flops: Sequence[float]
    block_again: Sequence[float]
    reshards: bool

    @property
    def labels(self) -> set[str]:
        """Of all that is simulated."""
        return {one.label for one in (*self.weights, *self.gradients)}

    def seconds(
        self,
        flops_per_s: float,
        num_micro: int,
        call_s: Callable[[Transfer], float],
        across: Sequence[Transfer] = (),
        *,
        meet: bool = True,
    ) -> float:
        """Of all passes of a step, until the last shard has its gradient. call_s: of one call on idle wires; across: what
        replicas average, labelled with the unit behind which it goes out; meet: on links of the others."""
        gather_s, reduce_s = [call_s(one) for one in self.weights], [call_s(one) for one in self.gradients]
        across_s = [sum(one.calls * call_s(one) for one in across if _unit(one) == _unit(its)) for its in self.gradients]
        lanes = _Lanes(across_s, meet)
        for micro in range(num_micro):
            last = micro == num_micro - 1
            for action, unit, flops in self._micro_batch(gathers=self.reshards or not micro, last=last):
                if action == "ask":
                    lanes.ask(WEIGHTS, unit, gather_s[unit])
                elif action == "wait":
                    lanes.wait(WEIGHTS, unit)
                elif action == "reduce":
                    lanes.ask(GRADIENTS, unit, reduce_s[unit])
                    lanes.hold(GRADIENTS, UNDER_WAY)
                else:
                    lanes.compute(flops / flops_per_s)
        lanes.wait_for_all()
        return lanes.now_s

    def _micro_batch(self, *, gathers: bool, last: bool) -> Iterator[tuple[str, int, float]]:
        """What a rank does: (action, unit, flops)."""
        number, asked = len(self.weights), 1
        if gathers:
            yield "ask", 0, 0.0
        for unit in range(number):
            if gathers:
                yield "wait", unit, 0.0
                ahead = min(number, unit + 1 + PREFETCH)
                yield from (("ask", one, 0.0) for one in range(asked, ahead))
                asked = ahead
            yield "compute", unit, self.block_flops[unit - 1] if unit else 0.0
        yield "compute", 0, self.head_flops
        if self.reshards and number > 1:
            yield "ask", number - 1, 0.0
        yield "compute", 0, BACKWARD_OVER_FORWARD * self.head_flops
        for unit in reversed(range(1, number)):
            if self.reshards:
                yield "wait", unit, 0.0
                if unit > 1:
                    yield "ask", unit - 1, 0.0
            yield "compute", unit, BACKWARD_OVER_FORWARD * self.block_flops[unit - 1] + self.block_again[unit - 1]
            if last:
                yield "reduce", unit, 0.0
        if last:
            yield "reduce", 0, 0.0


def gathered_bytes(workload: Workload, *, on_device: bool) -> tuple[int, int]:
    """Of a rank: the whole weights that it has at once, if blocks give them up, and what is on its way."""
    whole = workload.stored_bytes
    blocks = [
        sum(one.stored_bytes for one in workload.parameters if one.name.startswith(f"{it}.")) for it in workload.block_names
    ]
    root = whole - sum(blocks)
    largest = max(blocks, default=0)
    room = 1 if on_device or largest > MAPPED_BYTES else FRAGMENTS
    return min(whole, root + room * GATHERED_BLOCKS * largest), SENT_AT_ONCE * max(root, largest)


def _unit(transfer: Transfer) -> str:
    """In its label."""
    return transfer.label.rpartition(" ")[0]


class _Lanes:
    """The clock, and what is under way. across_s: by unit, of the averages that its reduction sets off; meet: on shared links."""

    def __init__(self, across_s: Sequence[float], meet: bool) -> None:
        self.now_s, self._across_s, self._apart = 0.0, across_s, set() if meet else {REPLICAS}
        self._queues: dict[str, deque[list[float]]] = {WEIGHTS: deque(), GRADIENTS: deque(), REPLICAS: deque()}

    def ask(self, lane: str, unit: int, seconds: float) -> None:
        self._queues[lane].append([unit, seconds])

    def wait(self, lane: str, unit: int) -> None:
        """Until what was asked for is there."""
        while any(one[0] == unit for one in self._queues[lane]):
            self._advance(float("inf"))

    def hold(self, lane: str, most: int) -> None:
        """Until no more than so many are under way."""
        while len(self._queues[lane]) > most:
            self._advance(float("inf"))

    def wait_for_all(self) -> None:
        while any(self._queues.values()):
            self._advance(float("inf"))

    def compute(self, seconds: float) -> None:
        """Meanwhile the lanes work."""
        end_s = self.now_s + seconds
        while any(self._queues.values()) and self.now_s < end_s:
            self._advance(end_s - self.now_s)
        self.now_s = max(self.now_s, end_s)

    def _advance(self, at_most_s: float) -> None:
        """To the next end of a message, or so far."""
        busy = {lane: queue for lane, queue in self._queues.items() if queue}
        slower = {lane: 1 if lane in self._apart else len(busy.keys() - self._apart) for lane in busy}
        step_s = min(at_most_s, min(queue[0][1] * slower[lane] for lane, queue in busy.items()))
        self.now_s += step_s
        for lane, queue in busy.items():
            queue[0][1] -= step_s / slower[lane]
            if queue[0][1] <= 1e-12:
                unit = int(queue.popleft()[0])
                if lane == GRADIENTS:
                    self.ask(REPLICAS, unit, self._across_s[unit])
