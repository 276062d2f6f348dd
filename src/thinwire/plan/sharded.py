"""The passes of a step whose ranks share out the states, simulated: what of gathering and reducing hides under compute. No torch.

A rank computes, and has a lane of gathers and one of reductions; each lane works on one message after the other. While both do,
each goes half as fast, for they share the links. In the order of the passes (units: the root, then the blocks):

    forward     root gathered; at each unit, when its weights are there, the next two are asked for; then it computes
    backward    the root's head computes first; at each unit the one before is asked for when its own weights are there ("always")
                behind a unit's last backward pass its gradients are reduced; the end is when all are
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from thinwire.traffic import Transfer
from thinwire.workload import BACKWARD_OVER_FORWARD, Workload

PREFETCH = 2
"""Units asked for ahead in the forward pass, as `compress_sharded` does."""
GATHERED_BLOCKS, SENT_AT_ONCE = 3, 3
"""Blocks with whole weights at once, and copies of the largest unit on its way."""
WEIGHTS, GRADIENTS = "weights", "gradients"


@dataclass(frozen=True, kw_only=True)
class ShardedPasses:
    """Of one rank. weights, gradients: what is sent for each unit, the root first, in one call; head_flops and block_flops:
    forward, of a micro-batch. reshards: the blocks, behind each pass."""

    weights: Sequence[Transfer]
    gradients: Sequence[Transfer]
    head_flops: float
    block_flops: Sequence[float]
    reshards: bool

    @property
    def labels(self) -> set[str]:
        """Of all that is simulated."""
        return {one.label for one in (*self.weights, *self.gradients)}

    def seconds(self, flops_per_s: float, num_micro: int, call_s: Callable[[Transfer], float]) -> float:
        """Of all passes of a step, until the last shard has its gradient. call_s: of one call on idle wires."""
        gather_s, reduce_s = [call_s(one) for one in self.weights], [call_s(one) for one in self.gradients]
        lanes = _Lanes()
        for micro in range(num_micro):
            last = micro == num_micro - 1
            for action, unit, flops in self._micro_batch(gathers=self.reshards or not micro, last=last):
                if action == "ask":
                    lanes.ask(WEIGHTS, unit, gather_s[unit])
                elif action == "wait":
                    lanes.wait(WEIGHTS, unit)
                elif action == "reduce":
                    lanes.ask(GRADIENTS, unit, reduce_s[unit])
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
        if self.reshards:
            yield "ask", number - 1, 0.0
        yield "compute", 0, BACKWARD_OVER_FORWARD * self.head_flops
        for unit in reversed(range(1, number)):
            if self.reshards:
                yield "wait", unit, 0.0
                if unit > 1:
                    yield "ask", unit - 1, 0.0
            yield "compute", unit, BACKWARD_OVER_FORWARD * self.block_flops[unit - 1]
            if last:
                yield "reduce", unit, 0.0
        if last:
            yield "reduce", 0, 0.0


def gathered_bytes(workload: Workload) -> tuple[int, int]:
    """Of a rank: the whole weights that it has at once, if blocks give them up, and what is on its way."""
    whole = workload.stored_bytes
    blocks = [
        sum(one.stored_bytes for one in workload.parameters if one.name.startswith(f"{it}.")) for it in workload.block_names
    ]
    root = whole - sum(blocks)
    largest = max(blocks, default=0)
    return min(whole, root + GATHERED_BLOCKS * largest), SENT_AT_ONCE * max(root, largest)


class _Lanes:
    """The clock, and what is under way."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queues: dict[str, deque[list[float]]] = {WEIGHTS: deque(), GRADIENTS: deque()}

    def ask(self, lane: str, unit: int, seconds: float) -> None:
        self._queues[lane].append([unit, seconds])

    def wait(self, lane: str, unit: int) -> None:
        """Until what was asked for is there."""
        while any(one[0] == unit for one in self._queues[lane]):
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
        busy = [queue for queue in self._queues.values() if queue]
        step_s = min(at_most_s, min(queue[0][1] for queue in busy) * len(busy))
        self.now_s += step_s
        for queue in busy:
            queue[0][1] -= step_s / len(busy)
            if queue[0][1] <= 1e-12:
                queue.popleft()
