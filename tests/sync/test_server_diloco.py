"""Asynchronous DiLoCo: in lockstep it is DiLoCo; quorum, grace and staleness; and replicas that are killed."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Event

import pytest
import torch
from cases import long
from services import serving, together, wait_for
from test_server_gradients import flat, held_out, loss_of, make_model, rows

from pool import start_server
from thinwire import AsyncDiLoCo, ParameterServerWorker
from thinwire.config.replicas import Code, DiLoCo, Gradients, Service
from thinwire.sync.server.connection import PeerLost

EVERY, ROUNDS, REPLICAS = 4, 3, 3


def service_of(**changes) -> Service:
    merge = DiLoCo(**{"learning_rate": 0.7, "momentum": 0.9} | changes)
    return Service(first_workers=REPLICAS, merge=merge, heartbeat_s=0.1, timeout_s=20)


def reference(weights: list[float]) -> torch.Tensor:
    """Synchronous DiLoCo in one process, as Douillard et al. 2023 write it."""
    outer, velocity = flat(make_model()), 0.0
    models = [make_model() for _ in range(REPLICAS)]
    inner = [torch.optim.AdamW(model.parameters(), lr=0.02) for model in models]
    for round_ in range(ROUNDS):
        mean = torch.zeros_like(outer)
        for replica, model in enumerate(models):
            torch.nn.utils.vector_to_parameters(outer.clone(), model.parameters())
            for step in range(round_ * EVERY, (round_ + 1) * EVERY):
                inner[replica].zero_grad()
                loss_of(model, rows(step, replica)).backward()
                inner[replica].step()
            mean += (outer - flat(model)) * weights[replica] / sum(weights)
        velocity = 0.9 * velocity + mean
        outer = outer - 0.7 * (mean + 0.9 * velocity)
    return outer


def train(
    address: str, replica: int, steps: int, pause_s: float = 0.0, tokens: float = 1.0, wait: Callable[[], object] = bool
) -> tuple[int, int]:
    """wait: what the first step waits for."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    name = f"r{replica}"
    with AsyncDiLoCo(model, optimizer, every=EVERY, store=address, name=name, tokens_per_step=tokens) as diloco:
        first = diloco.first_step
        for step in range(first, steps):
            loss_of(model, rows(step, replica)).backward()
            time.sleep(pause_s)
            if step == first:
                wait()
            optimizer.step()
            optimizer.zero_grad()
    return first, diloco.pushes


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [("tokens_squared_per_step", [1.0, 4.0, 9.0]), ("tokens", [1.0, 2.0, 3.0]), long("equal", [1.0, 1.0, 1.0])],
)
def test_with_a_quorum_of_all_it_is_diloco(weighting, weights) -> None:
    service = service_of(weighting=weighting).model_copy(update={"servers": 2})
    with serving(service) as running:
        together(*(partial(train, running.address, r, EVERY * ROUNDS, 0.0, r + 1.0) for r in range(REPLICAS)))
        torch.testing.assert_close(running.weights(), reference(weights), rtol=0, atol=1e-6)
        for server in running.servers:
            assert [merge.staleness for merge in server.merger.merges] == [[0] * REPLICAS] * ROUNDS


def test_a_late_push_is_in_the_next_merge_and_its_staleness_is_noted() -> None:
    with serving(service_of(quorum=2)) as running:
        merger = running.servers[0].merger
        late = partial(wait_for, lambda: merger.version >= 2)
        together(*(partial(train, running.address, r, 8 * EVERY, wait=late if r == 2 else bool) for r in range(REPLICAS)))
        assert merger.steps == {f"r{replica}": 8 * EVERY for replica in range(REPLICAS)}
        workers = [name for merge in merger.merges for name in merge.workers]
        assert {name: workers.count(name) for name in workers} == {"r0": 8, "r1": 8, "r2": 8}  # no push is lost
        assert merger.merges[0].workers == ["r0", "r1"]
        stale = [s for merge in merger.merges for name, s in zip(merge.workers, merge.staleness, strict=True) if name == "r2"]
        assert stale[0] >= 2 and min(min(merge.staleness) for merge in merger.merges) == 0


@pytest.mark.long
def test_grace_waits_for_the_others_but_not_longer() -> None:
    with serving(service_of(quorum=1, grace_s=30.0)) as running:  # all come well within it, so nobody waits for its end
        began = time.monotonic()
        together(*(partial(train, running.address, r, 2 * EVERY, 0.02 * r) for r in range(REPLICAS)))
        assert time.monotonic() - began < 30
        assert [merge.workers for merge in running.servers[0].merger.merges] == [["r0", "r1", "r2"]] * 2
    with serving(service_of(quorum=1, grace_s=0.5)) as running:
        late = partial(wait_for, lambda: running.servers[0].merger.version >= 1)
        together(*(partial(train, running.address, r, EVERY, wait=late if r == 2 else bool) for r in range(REPLICAS)))
        assert [merge.workers for merge in running.servers[0].merger.merges] == [["r0", "r1"], ["r2"]]


@pytest.mark.parametrize("kind", ["int4", long("int8")])
def test_coded_pushes_with_feedback_learn_as_float32_does(kind) -> None:
    losses = {}
    for code in ("none", kind):
        with serving(service_of().model_copy(update={"push": Code(kind=code)})) as running:
            together(*(partial(train, running.address, r, 8 * EVERY) for r in range(REPLICAS)))
            losses[code] = held_out(running.weights())
    assert losses["none"] < 0.9 * held_out(flat(make_model()))
    assert losses[kind] == pytest.approx(losses["none"], rel=0.05)


def replica_process(kind: str, address: str, replica: int, pause_s: float, go: Event | None = None) -> None:
    """A replica, or a parameter server's worker, in a process of its own, until the servers have had enough.

    go: what it waits for, with everything loaded.
    """
    torch.set_num_threads(1)
    assert go is None or go.wait(30)
    model = make_model()
    if kind == "diloco":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        with AsyncDiLoCo(model, optimizer, every=EVERY, store=address, name=f"r{replica}") as diloco:
            for step in diloco.remaining_steps():
                loss_of(model, rows(step, replica)).backward()
                time.sleep(pause_s)
                optimizer.step()
                optimizer.zero_grad()
        return
    with ParameterServerWorker(model, store=address, name=f"r{replica}") as worker:
        for step in worker.remaining_steps():
            loss_of(model, rows(step, replica)).backward()
            time.sleep(pause_s)
            worker.step()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["diloco", long("gradients")])
def test_one_of_three_is_killed_and_comes_back_and_the_others_lose_no_step(kind) -> None:
    start_server()
    context = multiprocessing.get_context("forkserver")
    total = 150
    # The default momentum would overshoot on so small a model, by an amount that the number of merges decides.
    merge = Gradients(delay=0, learning_rate=0.2) if kind == "gradients" else DiLoCo(momentum=0.5)
    service = service_of().model_copy(update={"total_tokens": float(total), "merge": merge})
    with serving(service) as running:

        def started(replica: int, go: Event | None = None) -> multiprocessing.Process:
            process = context.Process(target=replica_process, args=(kind, running.address, replica, 0.01, go), daemon=True)
            process.start()
            return process

        back = context.Event()
        processes = [*(started(replica) for replica in range(REPLICAS)), started(2, back)]
        server = running.servers[0]
        wait_for(lambda: server.merger.steps.get("r2", 0) >= 12)
        os.kill(processes[2].pid, signal.SIGKILL)
        processes.pop(2).join(5)
        wait_for(lambda: any(event.what == "lost" for event in server.events))
        behind = server.merger.version
        wait_for(lambda: server.merger.version >= behind + 2)  # the others go on without it
        back.set()
        for process in processes:
            process.join(20)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        lives = [(event.what, event.incarnation) for event in server.events if event.worker == "r2"]
        assert lives == [("joined", 1), ("lost", 1), ("joined", 2), ("left", 2)]
        assert not [event for event in server.events if event.what == "lost" and event.worker != "r2"]
        assert total <= server.merger.merged < total + REPLICAS and not server.merger.late
        if kind == "diloco":  # what it missed is done by all, and nobody merges alone at the end
            assert sum(server.merger.steps.values()) == server.merger.merged
            assert server.merger.steps["r0"] == server.merger.steps["r1"] > total / REPLICAS > server.merger.steps["r2"]
            assert server.merger.merges[-1].workers == ["r0", "r1", "r2"]
            assert all(merge.staleness == [0] * len(merge.workers) for merge in server.merger.merges)
        else:
            assert server.merger.version > total / REPLICAS
        found = held_out(running.weights())
    with serving(service) as undisturbed:
        together(*(partial(replica_process, kind, undisturbed.address, replica, 0.0) for replica in range(REPLICAS)))
        assert found < 1.1 * held_out(undisturbed.weights())  # as many tokens, in more merges


@pytest.mark.long
def test_a_stalled_replica_delays_and_is_given_up_after_the_time_out() -> None:
    start_server()
    context = multiprocessing.get_context("forkserver")
    service = service_of().model_copy(update={"first_workers": 2, "timeout_s": 3.0})
    with serving(service) as running:
        stalls = context.Process(target=replica_process, args=("diloco", running.address, 1, 0.01), daemon=True)
        stalls.start()
        thread = threading.Thread(target=train, args=(running.address, 0, 200, 0.01), daemon=True)
        thread.start()
        server = running.servers[0]
        wait_for(lambda: server.merger.version >= 2)
        os.kill(stalls.pid, signal.SIGSTOP)
        time.sleep(0.2)  # a merge that was under way is over
        before = server.merger.version
        time.sleep(0.5)
        assert server.merger.version <= before + 1  # the quorum waits: it only stalls
        os.kill(stalls.pid, signal.SIGCONT)
        wait_for(lambda: server.merger.version >= before + 3)
        assert not [event for event in server.events if event.what == "lost"]
        os.kill(stalls.pid, signal.SIGSTOP)
        wait_for(lambda: [event for event in server.events if event.what == "lost"])
        lost = next(event for event in server.events if event.what == "lost")
        assert lost.worker == "r1" and "was silent for 3 s" in lost.why  # whoever notices first: the watch, or a send to it
        before = server.merger.version
        wait_for(lambda: server.merger.version >= before + 2)  # the other goes on
        stalls.kill()
        stalls.join(5)
        thread.join(20)


@pytest.mark.long
def test_a_worker_that_waits_in_vain_names_the_server_in_one_line() -> None:
    service = service_of().model_copy(update={"first_workers": 1, "timeout_s": 2.0})
    with serving(service) as running:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        in_vain = pytest.raises(PeerLost, match=r"^server 0 on \S+ was silent for 2 s; raise timeout_s")
        with in_vain as caught, AsyncDiLoCo(model, optimizer, every=1, store=running.address, name="a"):
            loss_of(model, rows(0, 0)).backward()
            with running.servers[0].merger.changed:  # the server is stuck
                optimizer.step()
        assert caught.value.peer == f"server 0 on {socket.gethostname()}" and "\n" not in str(caught.value)
    with serving(service_of().model_copy(update={"first_workers": 1})) as running:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gone = pytest.raises(PeerLost, match=r"^server 0 on \S+ is gone: its connection is closed")
        with gone, AsyncDiLoCo(model, optimizer, every=1, store=running.address, name="a"):
            for link in list(running.servers[0]._connections.values()):
                link.cut()
            time.sleep(0.5)  # a send in the very moment in which gloo notices may be forgotten, and ends with timeout_s
            loss_of(model, rows(0, 0)).backward()
            optimizer.step()
