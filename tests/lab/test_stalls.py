"""Links that fall silent: what passes and what does not; short silence delays training, long silence ends it in one line."""

import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path

import pytest
from small_cluster import build_cluster

from command import TINY_RUN, thinwire
from thinwire.errors import UserError
from thinwire.lab.commands import Process, processes_for
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


RUN = (
    TINY_RUN
    + """
checkpoint_every = 5
timeout_s = 5
learning_rate = 1e-4
warmup_steps = 0
final_learning_rate = 1.0
"""
)
AT_S, SHORT_S, PAUSE_S = 2.0, 1.0, 3.0
"""AT_S: by then steps follow one another, on a busy machine too. TCP tries again no later than 1.5 s or so after a silence of 1 s
begins; the rest of PAUSE_S is for the steps to the next checkpoint."""


def trained(folder: Path) -> list[dict]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == "step"]


def changes(folder: Path, steps: int, run: str) -> list[str]:
    places = {"data.source": folder / "text.txt", "data.cache": folder / "cache", "train.run": folder / run}
    return [part for key, value in {"train.steps": steps, **places}.items() for part in ("--set", f"{key}={value}")]


def stalled_run(folder: Path) -> tuple[Path, LabResult, list[dict]]:
    """Endless training on two hosts; host1 is silent for a while, and then for good."""
    (folder / "text.txt").write_text("thin wires carry small numbers slowly " * 400)
    (folder / "run.toml").write_text(RUN)
    arguments = ["thinwire", "train", str(folder / "run.toml"), *changes(folder, 1_000_000, "run")]
    stalls = Stall("host1", AT_S, SHORT_S), Stall("host1", AT_S + SHORT_S + PAUSE_S, 1000.0)
    cluster = build_cluster()
    result = launch(cluster, processes_for(cluster, arguments), LabOptions(paced=False, stalls=stalls))
    return folder, result, trained(folder / "run")


AT_ONCE = (silent_ping, stalled_run)


@pytest.mark.lab
@pytest.mark.timeout(120)
def test_short_silence_delays_and_long_silence_ends_training_in_one_line(under_way: dict[Callable, Future]) -> None:
    folder, result, steps = under_way[stalled_run].result()
    assert result.exit_code == 4
    wanted = (
        r"host0: exit code 4: rank 0 on host0 gave up waiting for rank 1 on host1 after 5 s \(train.timeout_s\); the last whole"
    )
    assert re.match(wanted, result.failure or ""), result.failure
    times = [0.0, *(step["time_s"] for step in steps)]  # a checkpoint, which is in no step, may be what pauses
    paused = next(index for index, (before, after) in enumerate(pairwise(times)) if after - before > 0.9 * SHORT_S)
    assert len(steps) > paused + 2, "it did not go on"
    newest = int(sorted((folder / "run" / "checkpoints").glob("step-*"))[-1].name.removeprefix("step-"))
    assert newest > paused
    further = ("--set", f"train.steps={newest + 2}", "--set", "train.timeout_s=60")
    resumed = thinwire("train", "--resume", str(folder / "run"), *further, cwd=folder)
    assert resumed.returncode == 0 and f"at step {newest}" in resumed.stdout, resumed.stderr
    few = paused + 3
    plain = thinwire("train", "run.toml", *changes(folder, few, "plain"), cwd=folder)
    assert plain.returncode == 0, plain.stderr
    assert [step["loss"] for step in trained(folder / "plain")] == [step["loss"] for step in steps[:few]]
