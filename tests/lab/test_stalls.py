"""Links that fall silent: what passes and what does not."""

import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from small_cluster import build_cluster

from thinwire.errors import UserError
from thinwire.lab.commands import Process
from thinwire.lab.run import RESULTS, LabOptions, LabResult, launch
from thinwire.lab.stalls import Stall, steps_of
from thinwire.lab.wiring import wire
from warm import PYTHON

PING = f"""
import pathlib, socket, sys, time
if sys.argv[1] == "answer":
    connection, _ = socket.create_server(("0.0.0.0", 9999)).accept()
    while data := connection.recv(1):
        connection.sendall(data)
    sys.exit()
began = time.monotonic()
for _ in range(100):
    try:
        connection = socket.create_connection((sys.argv[2], 9999))
        break
    except ConnectionRefusedError:
        time.sleep(0.02)
answers = []
pathlib.Path(f"{RESULTS}/" + sys.argv[2] + " began").touch()
while time.monotonic() < began + float(sys.argv[3]):
    connection.sendall(b"x")
    connection.recv(1)
    answers.append(time.monotonic() - began)
    time.sleep(0.01)
pauses = [later - earlier for earlier, later in zip(answers, answers[1:])]
open(f"{RESULTS}/" + sys.argv[2], "w").write(str(max(pauses)))
"""


def silent_ping(_: Path) -> LabResult:
    """host0 asks host1, whose link falls silent, and host2 asks host3, whose does not."""
    cluster = build_cluster(*((f"host{index}", "switch") for index in range(4)))
    processes = []
    for index in range(4):
        argv = (PYTHON, "-S", "-c", PING, "ask" if index % 2 == 0 else "answer", f"host{index | 1}", "3")
        processes.append(Process(f"host{index}", argv, begins="host1 began"))  # who is asked of the silent one says when
    return launch(cluster, processes, LabOptions(stalls=(Stall("host1", 0.5, 1.0),)))


AT_ONCE = (silent_ping,)


@pytest.mark.lab
def test_no_frame_passes_and_tcp_goes_on(under_way: dict[Callable, Future]) -> None:
    result = under_way[silent_ping].result()
    assert result.failure is None
    assert float(result.results["host1"]) > 1.0 > float(result.results["host3"])


def test_steps_are_in_order_and_what_is_wrong_is_refused() -> None:
    cluster = build_cluster(("host0", "a"), ("host0", "b"), ("host1", "a"), ("host1", "b"))
    wiring = wire(cluster, netem=False)
    found = steps_of([Stall.read("host1:20 s:1 min"), Stall.read("host0:5:1")], cluster, wiring)
    assert [(step.at_s, len(step.lines)) for step in found] == [(5, 2), (6, 2), (20, 2), (80, 2)]
    assert found[2].lines == ("link set h1eth0 nomaster", "link set h1eth1 nomaster")
    assert found[3].lines == ("link set h1eth0 master b0", "link set h1eth1 master b1")
    assert len(steps_of([Stall("host1", 1, 5), Stall("host1", 6, 1)], cluster, wiring)) == 4  # one begins as the other ends
    for wrong, words in (
        (["host7:1:1"], "no host 'host7'; known: host0, host1"),
        (["host1:1"], "write HOST:AT:FOR"),
        (["host1:1:0"], "lasts longer than 0 s"),
        (["host1:1:x"], "'x' is not a number"),
        (["host1:1:5", "host1:2:1"], "is silent then already"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            steps_of([Stall.read(text) for text in wrong], cluster, wiring)
