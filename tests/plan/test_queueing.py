"""Queues: formulas against simulated arrivals and against each other, and those of a step's links against its bytes."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest

from thinwire.bench.queue import waits_of
from thinwire.cluster import load_cluster
from thinwire.collectives.price import link_seconds
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.parallel.schedules import orders
from thinwire.plan.cost import Setting, predict
from thinwire.plan.pipeline import Stages
from thinwire.plan.queueing import Queue, of_links, periodic_waiting, servers_for
from thinwire.traffic import Transfer
from thinwire.workload import Workload


@pytest.mark.parametrize(("sources", "period"), [(2, 2.5), (4, 5.0), (8, 10.0), (20, 40.0)])
def test_periodic_sources_wait_as_simulated(sources, period) -> None:
    draw = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        phases = np.sort(draw.uniform(0, period, sources))
        means.append(np.mean(waits_of([*phases, *(phases + period)], 1.0)[sources:]))
    assert periodic_waiting(sources, period) == pytest.approx(np.mean(means), rel=0.06)


def queue(**changes) -> Queue:
    return replace(Queue(name="link", arrivals="M/D/1", sources=8, arrivals_per_s=30.0, service_s=0.02), **changes)


def test_poisson_arrivals_wait_as_simulated() -> None:
    draw = np.random.default_rng(0)
    waits = waits_of(np.cumsum(draw.exponential(1 / 30, 60_000)), 0.02)
    assert queue().waiting_s == pytest.approx(np.mean(waits), rel=0.05)


def test_many_periodic_sources_are_like_poisson_and_few_wait_less() -> None:
    few, many = (queue(arrivals="nD/D/1", sources=count).waiting_s for count in (4, 400))
    assert few < many < queue().waiting_s < queue(arrivals="M/M/1").waiting_s
    assert many == pytest.approx(queue().waiting_s, rel=0.03)


@pytest.mark.parametrize("arrivals", ["M/M/1", "M/D/1", "nD/D/1", "incast"])
def test_little_counts_arrivals_not_seconds(arrivals) -> None:
    one = queue(arrivals=arrivals)
    assert one.number_waiting == pytest.approx(30 * one.waiting_s)
    assert one.number == pytest.approx(30 * (one.waiting_s + 0.02))
    faster = replace(one, arrivals_per_s=3000.0, service_s=0.0002)  # the same in a hundredth of the time
    assert faster.waiting_s == pytest.approx(one.waiting_s / 100)
    assert faster.number == pytest.approx(one.number)


def test_traffic_of_others_makes_services_longer_until_nothing_is_left() -> None:
    beside = queue(others=0.2, frame_s=1e-4)
    assert beside.utilisation == pytest.approx(0.6 / 0.8)
    assert beside.waiting_s > queue().waiting_s
    assert queue(others=0.5).waiting_s == inf
    with pytest.raises(UserError, match="others below 1"):
        queue(others=1.0)


def test_links_of_a_step_are_as_full_as_the_prediction_has_them() -> None:
    cluster, layout = load_cluster("two-racks"), Layout(data=4, pipe=2)
    stages = Stages(
        orders=orders("1f1b", 2, 1, 4), forward_flops=(1e9, 1e9), activation_bytes=(200_000,), gradient_bytes=(50_000,)
    )
    workload = Workload.of_parameters([("weight", (1000, 500))], 64)
    rates = (1e10,) * 8
    setting = Setting(cluster=cluster, layout=layout, workload=workload, micro_batches=4, flops_per_s=rates, stages=stages)
    transfers = [Transfer(label="gradients", axis="data", op="all_reduce", message_bytes=2**20, calls=3)]
    found = predict(setting, transfers)
    queues = of_links(setting, transfers, step_s=10.0)
    used = {one.name: one.utilisation for one in queues}
    busy_s = {f"{link.source} -> {link.target}": link_seconds(link, size) for link, size in found.links.items()}
    assert used == {name: pytest.approx(seconds / 10.0) for name, seconds in busy_s.items() if seconds}
    assert [one.utilisation for one in queues] == sorted(used[one.name] for one in queues)[::-1]


def test_servers_are_as_few_as_the_waiting_allows() -> None:
    servers = servers_for(workers=16, period_s=10.0, service_s=2.0, waiting_s=0.1)
    assert servers[0].waiting_s <= 0.1
    fewer = len(servers) - 1
    assert Queue(name="", arrivals="nD/D/1", sources=16, arrivals_per_s=1.6, service_s=2.0 / fewer).waiting_s > 0.1
    with pytest.raises(UserError, match="push less often"):
        servers_for(workers=16, period_s=0.001, service_s=100.0, waiting_s=1e-9, most=8)
