"""Passes of ranks that share the states, simulated: against what must hold on any wire, and what can be said in closed form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.plan.sharded import ShardedPasses
from thinwire.traffic import Transfer
from thinwire.workload import BACKWARD_OVER_FORWARD

RATE = 10.0


def passes(blocks: int, reshards: bool, again: float = 0.0) -> ShardedPasses:
    names = ["root", *(f"blocks.{index}" for index in range(blocks))]
    weights, gradients = (
        [Transfer(label=f"unit {name} {what}", axis="shard", op=op, message_bytes=8) for name in names]
        for what, op in (("weights", "all_gather"), ("gradients", "all_to_all"))
    )
    flops = {"head_flops": 5.0, "block_flops": [20.0] * blocks, "block_again": [again] * blocks}
    return ShardedPasses(weights=weights, gradients=gradients, **flops, reshards=reshards)


def compute_s(blocks: int, num_micro: int) -> float:
    return num_micro * (5.0 + 20.0 * blocks) * (1 + BACKWARD_OVER_FORWARD) / RATE


@given(st.integers(1, 6), st.booleans(), st.integers(1, 4), st.floats(0, 20), st.floats(0, 20))
def test_a_step_takes_no_less_than_its_compute_or_its_wire_and_no_more_than_both(
    blocks: int, reshards: bool, num_micro: int, gather_s: float, reduce_s: float
) -> None:
    seconds = passes(blocks, reshards).seconds(RATE, num_micro, lambda one: gather_s if one.op == "all_gather" else reduce_s)
    gathers = num_micro * (1 + 2 * blocks) if reshards else 1 + blocks
    wire_s, computing_s = gathers * gather_s + (1 + blocks) * reduce_s, compute_s(blocks, num_micro)
    assert max(wire_s, computing_s) <= seconds * (1 + 1e-9) and seconds <= (wire_s + computing_s) * (1 + 1e-9)


def test_what_is_computed_again_takes_its_time() -> None:
    seconds = passes(4, True, again=20.0).seconds(RATE, 2, lambda _: 0.0)
    assert seconds == pytest.approx(compute_s(4, 2) + 2 * 4 * 20.0 / RATE)


@pytest.mark.parametrize("reshards", [False, True])
def test_on_fast_wires_the_first_gathers_and_the_last_reductions_are_exposed(reshards: bool) -> None:
    """A block computes 2 s forward and 4 s back, the head 0.5 s and 1 s; the wire takes 1.5 s for each message."""
    seconds = passes(4, reshards).seconds(RATE, 1, lambda _: 1.5)
    again = 1.5 - 1.0 if reshards else 0.0  # the last block's, asked for when the head goes back
    assert seconds == pytest.approx(compute_s(4, 1) + 2 * 1.5 + again + 2 * 1.5)


@given(st.integers(1, 6), st.floats(0, 20), st.floats(0, 20), st.booleans())
def test_averages_between_replicas_hide_under_what_is_still_computed(
    blocks: int, reduce_s: float, across_s: float, meet: bool
) -> None:
    """No less than their own wire takes behind the first reduction, no more than if all of them came behind the passes; on links
    that are not the others' no more than where they meet; where nothing else travels only what outlasts the passes counts."""
    one = passes(blocks, False)
    across = [
        Transfer(label=f"unit {name} replicas", axis="data", op="all_reduce", message_bytes=8) for name in ("blocks.0", "root")
    ]

    def call_s(transfer: Transfer) -> float:
        return {"all_gather": 0.0, "all_to_all": reduce_s, "all_reduce": across_s}[transfer.op]

    behind = one.seconds(RATE, 1, call_s)
    seconds, apart = (one.seconds(RATE, 1, call_s, across, meet=both) for both in (meet, False))
    assert behind + across_s <= seconds * (1 + 1e-9) and seconds <= (behind + 2 * across_s) * (1 + 1e-9)
    assert apart <= seconds * (1 + 1e-9)
    early = [Transfer(label=f"unit blocks.{blocks - 1} replicas", axis="data", op="all_reduce", message_bytes=8)]
    hidden = one.seconds(RATE, 1, lambda transfer: across_s if transfer.op == "all_reduce" else 0.0, early)
    assert hidden == pytest.approx(max(compute_s(blocks, 1), compute_s(blocks, 1) - 4.0 * (blocks - 1) + across_s))


def test_weights_that_stay_are_gathered_in_the_first_micro_batch_only() -> None:
    once, stay, again = (passes(3, reshards).seconds(RATE, micro, lambda _: 3.0) for reshards, micro in ((0, 1), (0, 2), (1, 2)))
    assert stay == pytest.approx(once + compute_s(3, 1))
    assert again > stay
