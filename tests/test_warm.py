"""A warm command is a process like a cold one: the same output and exit code, its own group, killed by what it is sent."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from command import nothing_left, ranks_of, running, started, thinwire

WAITING = """
[train]
steps = 4
run = "run"
timeout_s = "30 s"
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "gone.toml"),
        *(pytest.param(each, marks=pytest.mark.long) for each in (("--version",), ("no-such-command",), ("report", "gone"))),
    ],
)
@pytest.mark.long
def test_warm_and_cold_print_the_same(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    warm, cold = (thinwire(*arguments, cwd=tmp_path, cold=cold) for cold in (False, True))
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("cold", [False, True])
def test_it_is_found_by_its_rank_and_ends_by_what_it_is_sent(tmp_path: Path, cold: bool) -> None:
    """A rank that waits for another one, which nobody starts."""
    (tmp_path / "run.toml").write_text(WAITING)
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    with started("train", "run.toml", cwd=tmp_path, cold=cold, **place) as process:
        while ranks_of(tmp_path) != {1: process.pid}:
            assert process.poll() is None
        assert running(tmp_path) == [process.pid] and os.getpgid(process.pid) == os.getsid(process.pid) == process.pid
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        os.kill(process.pid, signal.SIGKILL)
        assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == -signal.SIGKILL
    assert nothing_left(tmp_path)
