"""How a run may end: a rank that dies, a rank that stands still, Ctrl-C. One line, nothing left, no checkpoint lost."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from command import TINY_RUN, nothing_left, one_line, ranks_of, started, thinwire

RUN = (
    TINY_RUN
    + """
steps = 100000
checkpoint_every = 2
run = "run"
"""
)


def prepare(folder: Path, more: str = "") -> None:
    (folder / "text.txt").write_text("thin wires carry small numbers slowly " * 400)
    (folder / "run.toml").write_text(RUN + more)


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path, patience_s: float = 90) -> None:
    end = time.monotonic() + patience_s
    while not list((folder / "run" / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.05)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").glob("step-*"))


def test_a_rank_that_dies(tmp_path: Path) -> None:
    prepare(tmp_path)
    with started("train", "run.toml", cwd=tmp_path) as process:
        wait_for_checkpoint(process, tmp_path)
        os.kill(ranks_of(tmp_path)[1], signal.SIGKILL)
        _, err = process.communicate(timeout=45)
    assert process.returncode == 3, err
    assert "rank 1 (process " in one_line(err) and "SIGKILL; the last whole checkpoint is kept" in err
    assert nothing_left(tmp_path)
    newest = tmp_path / "run" / "checkpoints" / checkpoints(tmp_path)[-1]
    assert (newest / "checksums.json").is_file()
    step = int(newest.name.removeprefix("step-"))
    done = thinwire("train", "--resume", "run", "--set", f"train.steps={step + 2}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resumed {tmp_path / 'run'} at step {step}" in done.stdout


@pytest.mark.long
def test_a_rank_that_stands_still(tmp_path: Path) -> None:
    prepare(tmp_path, 'timeout_s = "4 s"\n')
    with started("train", "run.toml", cwd=tmp_path) as process:
        wait_for_checkpoint(process, tmp_path)
        stopped = ranks_of(tmp_path)[1]
        os.kill(stopped, signal.SIGSTOP)
        end = time.monotonic() + 30
        while 0 in ranks_of(tmp_path):
            assert time.monotonic() < end, "rank 0 does not give up"
            time.sleep(0.05)
        os.kill(stopped, signal.SIGCONT)  # too late; but it can end by itself now
        _, err = process.communicate(timeout=55)
    assert process.returncode != 0
    # The stopped one may notice too.
    assert re.match(r".*rank [01] on \S+ gave up waiting for rank 1 on \S+ after 4 s", one_line(err))
    assert nothing_left(tmp_path) and checkpoints(tmp_path)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.long)])
def test_control_c_saves_and_ends(tmp_path: Path, cold: bool) -> None:
    """Cold: command and ranks are new interpreters from their first line to their last."""
    prepare(tmp_path)
    with started("train", "run.toml", cwd=tmp_path, cold=cold) as process:
        wait_for_checkpoint(process, tmp_path)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=45)
    assert process.returncode == 130, err
    assert nothing_left(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "end" and events[-1]["reason"] == "interrupted"
    assert checkpoints(tmp_path)[-1] == f"step-{events[-1]['step']:06d}"
