"""Flows and round trips over real sockets on loopback, one thread a host."""

import gc
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from thinwire.errors import UserError
from thinwire.listening import listen
from thinwire.measure import links as links_module
from thinwire.measure import rounds
from thinwire.measure.links import Links, Peer, flow, round_trips


def on_hosts(num_hosts: int, work: Callable[[Links], Any], waiting: int = 0) -> list[Any]:
    """`work` on each host and on `waiting` processes that carry no host, in threads."""
    listeners = [listen("127.0.0.1", 0, "a test") for _ in range(num_hosts)]
    peers = [Peer(f"host{index}", "127.0.0.1", line.getsockname()[1]) for index, line in enumerate(listeners)]
    everyone = num_hosts + waiting
    barrier, values, results = threading.Barrier(everyone, timeout=20), [None] * everyone, [None] * everyone

    def serve(index: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[index] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        host = index if index < num_hosts else None
        links = Links(peers, host, listeners[host or 0], gather, lambda: (barrier.wait(), None)[1])
        results[index] = work(links)

    threads = [threading.Thread(target=serve, args=(index,), daemon=True) for index in range(everyone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for line in listeners:
        line.close()
    return results


def test_every_flow_of_every_round_is_sampled_and_everybody_gets_all_samples() -> None:
    plan = [[(0, 1), (1, 2), (2, 0)], [(0, 2)], [(2, 1), (1, 0)]]
    results = on_hosts(3, lambda links: links.stream(plan, 0.05), waiting=1)
    assert all(samples == results[0] for samples in results)
    assert {(sample.round, sample.flow) for sample in results[0]} == {(n, f) for n, flows in enumerate(plan) for f in flows}
    assert max(sample.mean_bps for sample in results[0]) > 1e6 < max(sample.steady_bps for sample in results[0])


def test_half_round_trips_of_every_pair() -> None:
    results = on_hosts(3, lambda links: links.trips(rounds.tournament(3)))
    assert {frozenset(pair) for pair in results[0]} == {frozenset(pair) for pair in ((0, 1), (0, 2), (1, 2))}
    assert all(0 < min(halves) < 1 for halves in results[0].values())


def test_a_flow_shows_the_rate_at_which_its_sender_sends() -> None:
    """A sender that paces itself in user space: 16 KiB each 4 ms. On a busy machine it may not get to it, so it may try again."""
    chunk, pause, tries = bytes(16 * 1024), 0.004, []
    wanted = pytest.approx(8 * len(chunk) / pause, rel=0.15)
    while not tries or (tries[-1] != wanted and len(tries) < 5):
        tries.append(rate_of_a_sender(chunk, pause, 0.6))
    assert tries[-1] == wanted, tries


def rate_of_a_sender(chunk: bytes, pause: float, seconds: float) -> float:
    with listen("127.0.0.1", 0, "a test") as listener:
        port = listener.getsockname()[1]

        def send() -> None:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
                begun = time.perf_counter()
                sent = 0
                while (now := time.perf_counter() - begun) < seconds:
                    if now >= sent * pause:
                        line.sendall(chunk)
                        sent += 1
                    time.sleep(0.001)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        arrivals = flow(listener, None, True, seconds)
        thread.join(5)
    return wire_rate(arrivals, seconds)


def wire_rate(arrivals: list[tuple[float, int]], seconds: float) -> float:
    from thinwire.measure.fit import steady_bps

    rate = steady_bps(arrivals, 0.3 * seconds, seconds)
    assert rate is not None
    return rate


def test_no_garbage_is_collected_while_a_flow_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "PATIENCE_S", 0.05)
    during, select = [], links_module.select.select

    def watched(*arguments: Any) -> Any:
        during.append(gc.isenabled())
        return select(*arguments)

    monkeypatch.setattr(links_module.select, "select", watched)
    with listen("127.0.0.1", 0, "a test") as listener:
        for work in (flow, round_trips):
            with pytest.raises(UserError):
                work(listener, None, 3, 0.01)
            assert gc.isenabled()
        thread = threading.Thread(target=lambda: socket.create_connection(listener.getsockname()).close())
        thread.start()
        flow(listener, None, True, 0.01)
        thread.join()
    assert gc.isenabled() and during and not any(during)


def test_nobody_listening_is_one_line_that_names_both_ends() -> None:
    with listen("127.0.0.1", 0, "a test") as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError, match=rf"{socket.gethostname()} cannot reach far at 127.0.0.1:{port}: .*TCP"):
        round_trips(listener, Peer("far", "127.0.0.1", port), 3, 1.0)


def test_nobody_calling_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "PATIENCE_S", 0.05)
    with listen("127.0.0.1", 0, "a test") as listener:
        with pytest.raises(UserError, match=r"waited 0.05 s for a flow"):
            flow(listener, None, True, 0.01)
        with pytest.raises(UserError, match=r"waited 0.05 s for another host"):
            round_trips(listener, None, 3, 1.0)


def test_a_broken_line_names_the_other_host() -> None:
    def work(links: Links) -> str:
        with pytest.raises(UserError, match=r"the line to host0 broke .*No such"), links._named(0, None):
            raise ConnectionResetError("No such line")
        return "named"

    assert on_hosts(1, work) == ["named"]
