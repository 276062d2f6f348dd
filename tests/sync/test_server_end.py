"""When a run of replicas is over: for all at once, when the agreed tokens are merged, whoever was killed meanwhile."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from services import serving, together, wait_for
from test_server_gradients import flat, loss_of, make_model, rows

from thinwire import AsyncDiLoCo, ParameterServerWorker
from thinwire.config.replicas import DiLoCo, Gradients, Service
from thinwire.errors import UserError
from thinwire.sync.server.diloco_merger import DiLoCoMerger, Merge
from thinwire.sync.server.flat import Span
from thinwire.sync.server.merger import Member, Pace, Push

EVERY, REPLICAS = 4, 3


def replica(address: str, number: int, before: Callable[[int], object] = bool) -> None:
    """before: what happens ahead of each step; it is given the number."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with AsyncDiLoCo(model, optimizer, store=address, name=f"r{number}") as diloco:
        for step in diloco.remaining_steps():
            before(step)
            loss_of(model, rows(step, number)).backward()
            optimizer.step()
            optimizer.zero_grad()


def reference(merges: list[Merge], total: int, dies_before: int) -> torch.Tensor:
    """The merges in one process: each is a round of DiLoCo among those that were in it. r2 has died before a step of its own."""
    outer, velocity, merged = flat(make_model()), 0.0, 0
    models = {f"r{number}": make_model() for number in range(REPLICAS)}
    inner = {name: torch.optim.AdamW(model.parameters(), lr=0.02) for name, model in models.items()}
    made = dict.fromkeys(models, 0)
    for merge in merges:
        steps = min(EVERY, math.ceil((total - merged) / len(merge.workers)))
        mean = torch.zeros_like(outer)
        for name in merge.workers:
            torch.nn.utils.vector_to_parameters(outer.clone(), models[name].parameters())
            if name == "r2" and made[name] == dies_before // EVERY * EVERY:
                inner[name] = torch.optim.AdamW(models[name].parameters(), lr=0.02)
            for step in range(made[name], made[name] + steps):
                inner[name].zero_grad()
                loss_of(models[name], rows(step, int(name[1:]))).backward()
                inner[name].step()
            made[name] += steps
            merged += steps
            mean += (outer - flat(models[name])) / len(merge.workers)
        velocity = 0.9 * velocity + mean
        outer = outer - 0.7 * (mean + 0.9 * velocity)
    assert total <= merged < total + REPLICAS
    return outer


@pytest.mark.parametrize("servers", [1, 2])
def test_with_a_death_each_merge_is_a_round_of_diloco_and_the_last_is_of_all(servers) -> None:
    total, dies_before = 121, 2 * EVERY + 2
    merge = DiLoCo(every=EVERY, learning_rate=0.7, momentum=0.9, weighting="equal")
    service = Service(first_workers=REPLICAS, servers=servers, merge=merge, total_tokens=total, heartbeat_s=0.1)

    def dies(step: int) -> None:
        if step == dies_before:
            raise ConnectionError

    def comes_back() -> None:
        with suppress(ConnectionError):
            replica(running.address, 2, dies)
        wait_for(lambda: all(any(len(m.workers) == 2 for m in server.merger.merges) for server in running.servers))
        replica(running.address, 2)

    def waits(step: int) -> None:
        """For the one that comes back, well before the end."""
        if step == 6 * EVERY:
            wait_for(lambda: all(any(event.incarnation == 2 for event in server.events) for server in running.servers))

    with serving(service) as running:
        together(*(partial(replica, running.address, number, waits) for number in (0, 1)), comes_back)
        merges = running.servers[0].merger.merges
        sizes = [len(merge.workers) for merge in merges]
        assert 2 in sizes and sizes[0] == sizes[-1] == 3 and min(sizes) == 2
        for server in running.servers:  # they take in the one that comes back at one version
            assert [merge.workers for merge in server.merger.merges] == [merge.workers for merge in merges]
        torch.testing.assert_close(running.weights(), reference(merges, total, dies_before), rtol=0, atol=1e-5)


@given(st.integers(0, 3), st.integers(1, 60), st.lists(st.integers(0, 11), max_size=80))
def test_whatever_happens_it_ends_for_all_when_the_tokens_are_merged(quorum: int, total: int, what: list[int]) -> None:
    """A merger without a network: in any order replicas push, die and come back; then those that live go on to the end."""
    merger = DiLoCoMerger(Service(first_workers=3, merge=DiLoCo(every=5, quorum=quorum), total_tokens=total))
    lives = dict.fromkeys(range(3), 1)
    allotted: dict[int, int] = {}

    def member(number: int) -> Member:
        return Member(f"r{number}", lives[number])

    def go_on() -> None:
        for number in range(3):
            if number not in allotted and member(number) in merger.live:
                standing = merger.admit(member(number), 0.0)
                if standing is not None:
                    allotted[number] = standing.local_steps

    def push(number: int) -> None:
        steps = allotted.pop(number)
        assert steps > 0
        merger.push(
            Push(member=member(number), values=torch.ones(2), version=0, weight=steps, local_steps=steps, learning_rate=0)
        )
        go_on()

    for number in range(3):
        merger.begin(member(number), Pace())
    merger.initialise(torch.zeros(2), [Span(0, 2, True)])
    go_on()
    assert set(allotted) == {0, 1, 2}
    for event in what:
        number = event % 3
        if merger.over:
            break
        if event >= 9 and member(number) in merger.live:
            merger.lost(member(number))
            allotted.pop(number, None)
        elif event >= 9 or (event >= 6 and member(number) not in merger.live):
            lives[number] += 1
            merger.begin(member(number), Pace())
        elif allotted.get(number):
            push(number)
            continue
        go_on()
    if not merger.live:
        lives[0] += 1
        merger.begin(member(0), Pace())
        go_on()
    while not merger.over:
        push(next(number for number in sorted(allotted)))  # StopIteration: all wait for one another
    assert total <= merger.merged < total + sum(merger.steps.values())
    before, weights = merger.merged, merger.weights.values.clone()
    for number, steps in list(allotted.items()):
        if steps:
            push(number)
            assert allotted[number] == 0
    assert merger.merged == before == sum(merger.steps.values()) and torch.equal(merger.weights.values, weights)


def test_one_that_comes_in_the_middle_is_not_waited_for() -> None:
    service = Service(first_workers=1, merge=DiLoCo(every=5), total_tokens=100)
    merger = DiLoCoMerger(service)
    first, second = Member("a", 1), Member("b", 1)
    merger.begin(first, Pace())
    merger.initialise(torch.zeros(2), [Span(0, 2, True)])
    assert merger.admit(first, 0.0).local_steps == 5
    merger.begin(second, Pace(every=2))
    assert merger.admit(second, 0.0) is None
    merger.push(Push(member=first, values=torch.ones(2), version=0, weight=5, local_steps=5, learning_rate=0))
    assert merger.version == 1
    standing = merger.admit(second, 0.0)
    assert (standing.version, standing.local_steps, standing.merged) == (1, 2, 5)


@pytest.mark.parametrize("delay", [0, 1, -1])
def test_gradients_end_at_the_tokens_too_and_a_late_one_changes_nothing(delay) -> None:
    service = Service(first_workers=2, merge=Gradients(delay=delay, learning_rate=0.1), total_tokens=40, heartbeat_s=0.1)

    def work(address: str, number: int, pause_s: float) -> None:
        model = make_model()
        with ParameterServerWorker(model, store=address, name=f"w{number}") as worker:
            for step in worker.remaining_steps():
                loss_of(model, rows(step, number)).backward()
                time.sleep(pause_s)
                worker.step(samples=2)

    with serving(service) as running:
        together(partial(work, running.address, 0, 0.001), partial(work, running.address, 1, 0.03))
        merger = running.servers[0].merger
        assert 40 <= merger.merged < 44
        assert sum(merger.steps.values()) * 2 == merger.merged
        if delay == -1:
            assert merger.steps["w0"] > merger.steps["w1"]  # the fast one does more of it


def test_a_loop_that_goes_on_after_the_end_is_told_how_to_end() -> None:
    service = Service(merge=Gradients(), total_tokens=1, heartbeat_s=0.1)
    with serving(service) as running:
        model = make_model()
        in_vain = pytest.raises(UserError, match="the 1 tokens that the servers were to merge are merged; end the loop")
        with in_vain, ParameterServerWorker(model, store=running.address, name="a") as worker:
            for _ in range(2):
                loss_of(model, rows(0, 0)).backward()
                worker.step()


def test_a_quorum_wants_one_server() -> None:
    with pytest.raises(ValueError, match="a quorum of 2 with 3 servers"):
        Service(servers=3, merge=DiLoCo(quorum=2))


@pytest.mark.long
def test_a_server_that_lets_wait_is_not_silent() -> None:
    service = Service(first_workers=2, merge=DiLoCo(every=EVERY), total_tokens=8, heartbeat_s=0.05, timeout_s=1.5)
    with serving(service) as running:

        def late() -> None:
            time.sleep(2.5)
            replica(running.address, 1)

        together(partial(replica, running.address, 0), late)
        assert running.servers[0].merger.merged == 8
        assert [event.what for event in running.servers[0].events] == ["joined", "joined", "left", "left"]
