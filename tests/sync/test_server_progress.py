"""Progress, not life: whoever makes none for timeout_s is lost, whoever waits or says that it pauses is not."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from functools import partial

import pytest
import torch
from cases import long
from services import answer, any_answer, greeted, serving, together, wait_for
from test_server_diloco import replica_process
from test_server_gradients import NUMEL, loss_of, make_model, rows

from pool import start_server
from thinwire import AsyncDiLoCo, ParameterServerWorker
from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import DiLoCo, Gradients, Service
from thinwire.errors import UserError
from thinwire.sync.server.connection import Connection, PeerLost
from thinwire.sync.server.connections import Connections
from thinwire.sync.server.message import Head, Kind

TIMEOUT_S = 2.0


def service_of(workers: int, **changes) -> Service:
    fields = {"merge": DiLoCo(every=4), "first_workers": workers, "heartbeat_s": 0.1, "timeout_s": TIMEOUT_S} | changes
    return Service(**fields)


def lost(running) -> dict[str, str]:
    return {event.worker: event.why for server in running.servers for event in server.events if event.what == "lost"}


def loop(address: str, name: str, steps: int, at: int = -1, pause=bool) -> None:
    """pause: what happens before step `at`; it is given the replica."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with AsyncDiLoCo(model, optimizer, store=address, name=name) as replica:
        for step in range(steps):
            if step == at:
                pause(replica)
            loss_of(model, rows(step, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.long
def test_a_worker_whose_loop_hangs_is_lost_after_the_time_out_and_told_so() -> None:
    with serving(service_of(2)) as running:
        wakes = threading.Event()

        def hangs(address: str) -> None:
            given_up = pytest.raises(
                PeerLost, match=r"server 0 on .* has given this worker up: it made no step .* 2 s; .*alive\(\)"
            )
            with given_up:
                loop(address, "b", 12, at=5, pause=lambda replica: wakes.wait(30))

        def goes_on(address: str) -> None:
            loop(address, "a", 12)
            wakes.set()

        began = time.monotonic()
        together(partial(goes_on, running.address), partial(hangs, running.address))
        assert "was silent for 2 s" in lost(running)["b"] and "alive()" in lost(running)["b"]
        assert set(lost(running)) == {"b"} and time.monotonic() - began >= TIMEOUT_S
        assert running.servers[0].merger.steps["a"] == 12


@pytest.mark.long
@pytest.mark.parametrize("kind", ["diloco", long("gradients")])
def test_a_pause_in_which_a_worker_says_that_it_is_alive_is_none(kind) -> None:
    def pauses(replica: AsyncDiLoCo | ParameterServerWorker) -> None:
        end = time.monotonic() + 1.5 * TIMEOUT_S
        while time.monotonic() < end:
            replica.alive()
            time.sleep(0.01)

    def gradients(address: str) -> None:
        model = make_model()
        with ParameterServerWorker(model, store=address, name="a") as worker:
            for step in range(3):
                loss_of(model, rows(step, 0)).backward()
                if step == 1:
                    pauses(worker)
                worker.step()

    if kind == "diloco":
        with serving(service_of(1)) as running:
            loop(running.address, "a", 6, at=2, pause=pauses)
            assert not lost(running)
        return
    with serving(service_of(1, merge=Gradients())) as running:
        gradients(running.address)
        assert not lost(running) and running.servers[0].merger.version == 3


@pytest.mark.long
def test_local_steps_are_progress_and_few_bytes() -> None:
    """A round that takes longer than timeout_s, of steps that do not."""
    with serving(service_of(1, merge=DiLoCo(every=30))) as running:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with AsyncDiLoCo(model, optimizer, store=running.address, name="a") as replica:
            began = time.monotonic()
            for step in range(30):
                loss_of(model, rows(step, 0)).backward()
                time.sleep(1.5 * TIMEOUT_S / 30)
                optimizer.step()
            took_s = time.monotonic() - began
            totals = {call.label: (call.message_bytes, total.calls) for call, total in replica.ledger.snapshot().items()}
        size, calls = totals["progress to server 0"]
        assert size == 64 and 5 <= calls <= took_s / 0.1 + 1
        assert not lost(running) and running.servers[0].merger.version == 1


@pytest.mark.long
def test_a_worker_that_waits_for_one_server_is_not_lost_to_the_other() -> None:
    """Server 1 answers at once, server 0 only much later."""
    with serving(service_of(1, servers=2)) as running:

        def slow(replica: AsyncDiLoCo) -> None:
            threading.Thread(target=held, args=(running.servers[0].merger,), daemon=True).start()
            time.sleep(0.2)

        def held(merger) -> None:
            admit, until = merger.admit, time.monotonic() + 2 * TIMEOUT_S

            def late(member, patience_s):
                time.sleep(patience_s / 4)
                return None if time.monotonic() < until else admit(member, patience_s)

            merger.admit = late

        loop(running.address, "a", 8, at=3, pause=slow)
        assert not lost(running) and [server.merger.version for server in running.servers] == [2, 2]


@pytest.mark.parametrize("waits", ["begin", "pull", "push"])
def test_a_worker_that_is_killed_while_it_waits_is_noticed_at_once(waits) -> None:
    """timeout_s is far away. It waits for another's first weights, to begin, or for a merge."""
    service = service_of(3 if waits == "pull" else 2, timeout_s=300)
    with serving(service) as running:
        first = greeted(running.address, "first", NUMEL)
        if waits != "begin":
            model = threading.Thread(target=starts, args=(first,), daemon=True)
            model.start()
            model.join(20)
        process = start_server() and multiprocessing.get_context("forkserver").Process(
            target=replica_process, args=("diloco", running.address, 1, 0.0), daemon=True
        )
        if waits == "begin":
            first.send(Head(kind=Kind.BEGIN))
            assert answer(first)[0].step == 1
        process.start()
        server = running.servers[0]
        wait_for(lambda: server._waiting and any(member.name == "r1" for member in server._waiting))
        os.kill(process.pid, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: "r1" in lost(running))
        assert time.monotonic() - killed < 10 and "is gone: its connection is closed" in lost(running)["r1"]
        process.join(10)
        first.cut()
        first.close()


def starts(link: Connection) -> None:
    """Gives the weights, by hand, as `first` says."""
    from thinwire.sync.server.flat import Span
    from thinwire.sync.server.message import pack_start

    link.send(Head(kind=Kind.BEGIN))
    number = answer(link)[0].step
    link.send(Head(kind=Kind.INIT, step=number, local_steps=1), pack_start(torch.zeros(NUMEL), [Span(0, NUMEL, True)]))
    assert answer(link)[0].kind == Kind.STATE


@pytest.mark.long
def test_a_long_payload_over_a_slow_link_is_not_silence_and_half_of_one_is() -> None:
    """Pieces that take longer than timeout_s together; then one that stops in the middle."""
    with serving(service_of(1, timeout_s=1.0)) as running:
        for stops in (False, True):
            link = greeted(running.address, "a", NUMEL)
            if not stops:
                starts(link)
            link.send(Head(kind=Kind.PULL))
            version = answer(link)[0].version
            data = Head(kind=Kind.PUSH, version=version, weight=1.0, local_steps=1, payload_bytes=4 * NUMEL).packed()
            data += torch.zeros(NUMEL).numpy().tobytes()
            for first in range(0, len(data) // (2 if stops else 1), 20):
                link.sock.send(data[first : first + 20])
                time.sleep(0.15)
            if not stops:
                assert answer(link)[0].kind == Kind.WEIGHTS
                link.send(Head(kind=Kind.LEAVE))
                answer(link)
            else:
                link._timeout_s = 20
                assert link.receive(any_answer)[0].kind == Kind.LOST
            link.close()
        assert set(lost(running)) == {"a"} and "was silent for 1 s" in lost(running)["a"]


def test_two_processes_of_one_name_are_two_lives_and_the_older_is_told_so() -> None:
    with serving(service_of(1, timeout_s=60)) as running:
        in_vain = pytest.raises(PeerLost, match="another life of a has come, in a process of its own")
        with in_vain:
            loop(running.address, "a", 8, at=2, pause=lambda replica: loop(running.address, "a", 4))
        assert [(e.what, e.incarnation) for e in running.servers[0].events] == [
            ("joined", 1),
            ("lost", 1),
            ("joined", 2),
            ("left", 2),
        ]


def test_a_server_that_is_silent_is_named_while_the_link_stands() -> None:
    """In the other direction: a peer that never answers."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    link = Connection(ours, ("server 0", "nowhere"), Ledger(), 0.3, "raise timeout_s")
    with pytest.raises(PeerLost, match=r"server 0 on nowhere was silent for 0\.3 s; raise timeout_s"):
        link.receive(any_answer)
    theirs.close()
    with pytest.raises(PeerLost, match="is gone: its connection is closed"):
        link.receive(any_answer)
    link.close()


WRONG_NUMBERS = [
    ({"samples": -1.0}, "-1 samples"),
    ({"samples": float("nan")}, "nan samples"),
    ({"learning_rate": -0.1}, "learning rate of -0.1"),
    ({"learning_rate": float("inf")}, "learning rate of inf"),
]


@pytest.mark.parametrize(("numbers", "words"), WRONG_NUMBERS)
def test_a_workers_wrong_numbers_are_refused_before_they_are_sent(numbers, words) -> None:
    with serving(service_of(1, merge=Gradients())) as running:
        model = make_model()
        with pytest.raises(UserError, match=words), ParameterServerWorker(model, store=running.address, name="a") as worker:
            loss_of(model, rows(0, 0)).backward()
            worker.step(**numbers)
        assert running.servers[0].merger.version == 0


@pytest.mark.parametrize("tokens", [0.0, -1.0, float("nan"), float("inf")])
def test_tokens_per_step_that_cannot_be_are_refused_by_both_sides(tokens) -> None:
    with serving(service_of(1)) as running:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(UserError, match="tokens_per_step = "):
            AsyncDiLoCo(model, optimizer, store=running.address, name="a", tokens_per_step=tokens)
        with pytest.raises(UserError, match="tokens_per_step = "):
            greeted(running.address, "a", NUMEL, tokens_per_step=tokens)
        assert not running.servers[0].events


def test_a_refused_push_is_told_to_its_sender_alone() -> None:
    """The worker's own checks are gone round: it pushes what is not finite, and another goes on to the end."""
    with serving(service_of(2, timeout_s=60)) as running:

        def refused() -> None:
            model = make_model()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            line = pytest.raises(UserError, match=r"^what is pushed is not finite; lower the learning rate")
            with line, AsyncDiLoCo(model, optimizer, store=running.address, name="b") as replica:
                replica.client._coder.encode = lambda name, values, extent: torch.full_like(values, torch.inf)
                for step in range(8):
                    loss_of(model, rows(step, 0)).backward()
                    optimizer.step()

        together(partial(loop, running.address, "a", 12), refused)
        assert "was refused: what is pushed is not finite" in lost(running)["b"] and set(lost(running)) == {"b"}
        assert running.servers[0].merger.steps["a"] == 12 and torch.isfinite(running.weights()).all()
        assert not running.failures


@pytest.mark.long  # in short: a worker that waits for one server is not lost to the other
def test_answers_of_several_servers_are_read_as_they_come() -> None:
    """Server 0's takes twice timeout_s; server 1, whose answer fills every buffer, is read at once, and hears of the worker."""
    service = service_of(1, servers=2)
    size, pieces = 2**25, 40
    pairs = [socket.socketpair() for _ in range(2)]
    for pair in pairs:
        for sock in pair:
            sock.setblocking(False)
    links = Connections(service, lambda index: pieces if index == 0 else size)
    servers = [Connection(theirs, ("worker a", "here"), Ledger(), TIMEOUT_S) for _, theirs in pairs]
    for index, (ours, _) in enumerate(pairs):
        links.add(index, Connection(ours, (f"server {index}", "there"), Ledger(), TIMEOUT_S))
    heard = []

    def slow() -> None:
        servers[0].receive(any_answer)
        servers[0].sock.send(Head(kind=Kind.WEIGHTS, payload_bytes=pieces).packed())
        for _ in range(pieces):
            time.sleep(2 * TIMEOUT_S / pieces)
            servers[0].sock.send(b"x")

    def long() -> None:
        servers[1].receive(any_answer)
        servers[1].send(Head(kind=Kind.WEIGHTS), torch.zeros(size, dtype=torch.uint8))
        heard.append(time.monotonic())
        while len(heard) < 5:
            assert servers[1].receive(any_answer)[0].kind == Kind.PROGRESS
            heard.append(time.monotonic())

    def worker() -> float:
        answers = links.ask({index: (Head(kind=Kind.PULL), None, "") for index in range(2)})
        assert [payload.numel() for _, payload in (answers[0], answers[1])] == [pieces, size]
        return time.monotonic()

    ended = together(slow, long, worker)[2]
    assert max(heard) < ended
    links.cut()
    for server in servers:
        server.close()
