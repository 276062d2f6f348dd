"""The first weights: however workers race, die or stall in between, all servers end up with one worker's model."""

import random
import threading
import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from services import answer, greeted, serving, together, wait_for
from torch import nn

from thinwire import ParameterServerWorker
from thinwire.config.replicas import Gradients, Service
from thinwire.errors import UserError
from thinwire.sync.server.flat import Span
from thinwire.sync.server.lease import Lease
from thinwire.sync.server.merger import Member
from thinwire.sync.server.message import Head, Kind, pack_start

SERVERS, NUMEL = 3, 30
SERVICE = Service(servers=SERVERS, first_workers=1, merge=Gradients(delay=-1), heartbeat_s=0.05, timeout_s=60)


def model_of(value: float) -> nn.Module:
    model = nn.Linear(NUMEL, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


class Dies(Exception):
    """As a process does that is killed: without a word."""


def starts(address: str, value: float, dies_at: int) -> None:
    """A worker that dies once it has sent so many ranges of first weights; never if that is SERVERS."""
    worker = ParameterServerWorker(model_of(value), store=address, name=f"w{value:g}")
    sent, make = 0, worker.client._start

    def start(*arguments):
        nonlocal sent
        if sent == dies_at:
            raise Dies
        sent += 1
        return make(*arguments)

    worker.client._start = start
    try:
        with worker:
            assert len(set(worker.client.weights.tolist())) == 1, "a mixture of two models"
    except Dies:
        pass


@pytest.mark.parametrize("seed", range(6))
def test_racing_first_workers_that_die_in_between_never_mix_two_models(seed) -> None:
    """Of five, two or three die after 0 to SERVERS - 1 ranges; whoever holds the lease last gives all ranges."""
    chance = random.Random(seed)
    with serving(SERVICE) as running:
        dies_at = [*(chance.randrange(SERVERS) for _ in range(3)), SERVERS, SERVERS]
        chance.shuffle(dies_at)
        together(*(partial(starts, running.address, float(value), at) for value, at in enumerate(dies_at, 1)))
        found = set(running.weights().tolist())
        assert len(found) == 1 and dies_at[int(found.pop()) - 1] == SERVERS
        models = {server.merger.state_dict()["model"] for server in running.servers}
        assert len(models) == 1 and not running.failures


def test_others_wait_while_one_holds_the_lease_and_take_it_over_when_it_is_lost() -> None:
    service = SERVICE.model_copy(update={"servers": 1})
    with serving(service) as running:
        links = [greeted(running.address, name, NUMEL) for name in "ab"]
        links[0].send(Head(kind=Kind.BEGIN))
        assert answer(links[0])[0].step == 1
        links[1].send(Head(kind=Kind.BEGIN))
        time.sleep(0.3)
        assert not links[1].can_be_read() and len(running.servers[0]._waiting) == 1
        links[0].cut()
        assert answer(links[1])[0].step == 2
        start = pack_start(torch.ones(NUMEL), [Span(0, NUMEL, True)])
        third = greeted(running.address, "c", NUMEL)
        for number in (1, 2, 3):  # it was not asked
            third.send(Head(kind=Kind.INIT, step=number, local_steps=1), start)
            assert answer(third)[0].kind == Kind.REFUSED
            third.close()
            third = greeted(running.address, "c", NUMEL)
        links[1].send(Head(kind=Kind.INIT, step=2, local_steps=1, version=7), start)
        assert answer(links[1])[0].kind == Kind.STATE
        third.send(Head(kind=Kind.BEGIN))
        assert answer(third)[0].step == 0
        for link in (*links, third):
            link.close()
        assert running.servers[0].merger.state_dict()["model"] == 7


def test_one_that_was_given_up_meanwhile_overwrites_nobody() -> None:
    """Its weights are under way to server 1 while another, with the lease after it, gives its own."""
    with serving(SERVICE.model_copy(update={"servers": 2})) as running:
        slow = ParameterServerWorker(model_of(1.0), store=running.address, name="slow")
        comes, make = threading.Event(), slow.client._start

        def start(index, *arguments):
            if index == 1:
                running.servers[0]._lose(Member("slow", 1), "was silent")
                comes.wait(20)
            return make(index, *arguments)

        slow.client._start = start

        def given_up() -> None:
            with pytest.raises(UserError, match=r"first weights (from a worker that was given up meanwhile|for a server whose)"):
                slow.__enter__()

        thread = threading.Thread(target=given_up, daemon=True)
        thread.start()
        wait_for(lambda: any(event.what == "lost" for event in running.servers[0].events))
        with ParameterServerWorker(model_of(2.0), store=running.address, name="other") as other:
            comes.set()
            thread.join(20)
            assert not thread.is_alive() and set(other.client.weights.tolist()) == {2.0}
        assert set(running.weights().tolist()) == {2.0}


def test_a_model_of_another_size_is_refused_wherever_it_comes() -> None:
    with serving(SERVICE.model_copy(update={"servers": 1})) as running:
        links = [greeted(running.address, "a", NUMEL), greeted(running.address, "b", NUMEL + 1)]
        links[0].send(Head(kind=Kind.BEGIN))
        number = answer(links[0])[0].step
        links[1].send(Head(kind=Kind.BEGIN))
        links[0].send(Head(kind=Kind.INIT, step=number, local_steps=1), pack_start(torch.ones(NUMEL), [Span(0, NUMEL, True)]))
        answer(links[0])
        assert answer(links[1])[0].step == 0
        links[1].send(Head(kind=Kind.PULL))
        assert answer(links[1])[0].kind == Kind.REFUSED
        for link in links:
            link.close()
        with pytest.raises(UserError, match="a server holds 30 weights where this model has 5"):
            ParameterServerWorker(nn.Linear(5, 1, bias=False), store=running.address, name="c").__enter__()


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30))
def test_one_live_worker_at_a_time_holds_the_lease_and_its_number_grows(what: list[tuple[int, bool]]) -> None:
    """Workers ask (True) or are lost, in any order."""
    lease, holder, numbers = Lease(), None, []
    for number, asks in what:
        member = Member(f"w{number}", 1)
        if not asks:
            lease.lost(member)
            holder = None if holder == member else holder
            continue
        found = lease.acquire(member, 0.0)
        assert (found is not None) == (holder in (None, member))
        if found is not None:
            if holder is None:
                numbers.append(found)
            holder = member
        assert all(lease.is_held_by(Member(f"w{other}", 1)) == (holder == Member(f"w{other}", 1)) for other in range(4))
    assert numbers == sorted(set(numbers))
    lease.end()
    assert lease.acquire(Member("late", 1), 0.0) == 0 and not lease.accept(10**6)
