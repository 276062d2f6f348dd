"""Training on hosts whose links fall silent: short silence delays it, long silence ends it in one line."""

import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path

import pytest
from small_cluster import build_cluster

from command import TINY_RUN, thinwire
from thinwire.lab.commands import processes_for
from thinwire.lab.run import LabOptions, LabResult, launch
from thinwire.lab.stalls import Stall

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(120)]

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


AT_ONCE = (stalled_run,)


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
