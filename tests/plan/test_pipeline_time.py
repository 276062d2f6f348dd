"""What a step of a pipeline takes: known cases in closed form, and bounds that no run can beat."""

import pytest

from thinwire.cluster import load_cluster
from thinwire.cluster.graph import Routes
from thinwire.layout import Layout
from thinwire.parallel.schedules import orders
from thinwire.plan.pipeline import Pipelines, Simulated, Stages, simulate

FORWARD_S, BACKWARD_S = 1.0, 2.0


def run(
    schedule: str, ranks: int, num_micro: int, message_bytes: int = 0, per_rank: int = 1, groups: list | None = None
) -> Simulated:
    stages = ranks * per_rank
    seconds = {
        (kind, stage): value / per_rank
        for stage in range(stages)
        for kind, value in {"F": FORWARD_S, "B": BACKWARD_S, "I": BACKWARD_S / 2, "W": BACKWARD_S / 2}.items()
    }
    pipelines = Pipelines(
        orders=orders(schedule, ranks, per_rank, num_micro),
        groups=groups or [list(range(ranks))],
        seconds=seconds,
        activation_bytes=[message_bytes] * (stages - 1),
        gradient_bytes=[message_bytes] * (stages - 1),
    )
    return simulate(pipelines, Routes(load_cluster("four-hosts-100mbit")))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "num_micro"), [(2, 2), (2, 8), (4, 4), (4, 8)])
def test_the_bubble_of_idle_wires(schedule: str, ranks: int, num_micro: int) -> None:
    """(p - 1) / (m + p - 1), Huang et al. 2019."""
    found = run(schedule, ranks, num_micro)
    assert found.seconds == pytest.approx((num_micro + ranks - 1) * (FORWARD_S + BACKWARD_S), rel=0.01)
    assert found.bubble == pytest.approx((ranks - 1) / (num_micro + ranks - 1), rel=0.02)


def test_interleaving_halves_the_bubble() -> None:
    """(p - 1) / (v m), of ideal time, Narayanan et al. 2021."""
    found = run("interleaved", 4, 8, per_rank=2)
    assert found.seconds == pytest.approx((8 + 3 / 2) * (FORWARD_S + BACKWARD_S), rel=0.01)


@pytest.mark.parametrize("schedule", ["zb1p", "zbv", "dualpipev"])
def test_weights_apart_fill_bubbles(schedule: str) -> None:
    per_rank = 1 if schedule == "zb1p" else 2
    assert run(schedule, 4, 8, per_rank=per_rank).bubble < 0.75 * run("1f1b", 4, 8).bubble


def test_a_thin_wire_is_the_bound() -> None:
    """100 Mbit/s: 20 messages of 10 MB each way take 20 x 0.837 s at least, where computing takes 60 s; with 100 MB, 167 s."""
    assert run("1f1b", 4, 20, 10_000_000).seconds < 1.25 * (20 + 3) * 3
    wire_s = 100_000_000 * 8 * 1.0466 / 100e6
    slow = run("1f1b", 4, 20, 100_000_000)
    assert slow.seconds > 20 * wire_s
    assert max(slow.link_bytes.values()) == 2 * 20 * 100_000_000  # a rank in the middle sends both ways


def test_pipelines_that_share_a_link_take_its_time_together() -> None:
    alone = run("1f1b", 2, 8, 100_000_000, groups=[[0, 1]])
    apart = run("1f1b", 2, 8, 100_000_000, groups=[[0, 1], [2, 3]])
    assert apart.seconds == pytest.approx(alone.seconds)
    same = run("1f1b", 2, 8, 100_000_000, groups=[[0, 1], [0, 1]])
    assert same.seconds > 1.8 * alone.seconds


def test_what_passes_stand_still_for_makes_each_of_them_longer() -> None:
    """(m + p - 1) passes forward and back, each with its sums."""
    stages = Stages(
        orders=orders("1f1b", 2, 1, 4),
        forward_flops=[1e9, 1e9],
        activation_bytes=[0],
        gradient_bytes=[0],
    )
    sums_s = {("F", stage): 0.5 for stage in (0, 1)} | {("B", stage): 0.25 for stage in (0, 1)}
    layout, rates, routes = Layout(pipe=2, tensor=2), (1e9,) * 4, Routes(load_cluster("four-hosts-100mbit"))
    plain, longer = (simulate(stages.pipelines(layout, rates, sums_s=each), routes).seconds for each in ({}, sums_s))
    assert plain == pytest.approx((4 + 1) * (1 + 2))
    assert longer == pytest.approx((4 + 1) * (1.5 + 2.25))


def test_the_slowest_tensor_rank_sets_the_pace_of_a_stage() -> None:
    """By its part of the stage and its rate together: the first rank has most, the second is slow, in one stage of two."""
    stages = Stages(
        orders=orders("gpipe", 2, 1, 1),
        forward_flops=[3e9, 1e9],
        activation_bytes=[0],
        gradient_bytes=[0],
        tensor_flops=[[3e9, 1e9], [2e9, 1e9]],
    )
    layout, routes = Layout(pipe=2, tensor=2), Routes(load_cluster("four-hosts-100mbit"))
    assert simulate(stages.pipelines(layout, (1e9, 1e9, 1e9, 1e9)), routes).seconds == pytest.approx(3 * (3 + 1))
    assert simulate(stages.pipelines(layout, (1e9, 0.5e9, 1e9, 1e9)), routes).seconds == pytest.approx(3 * (4 + 1))
