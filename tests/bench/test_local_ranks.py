"""Ranks that a benchmark starts on this machine do not outlive it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

BENCH = """
import sys
from thinwire.bench.ranks import run_local
write = "import os, sys, time; open(sys.argv[1] + os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(60)"
run_local([[sys.executable, "-c", write, sys.argv[1] + "/"]], 2)
"""


def alive(process: int) -> bool:
    """Not one that has ended and that its adopter has yet to wait for, where the system tells."""
    stat = Path(f"/proc/{process}/stat")
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(process, 0)
        return not Path("/proc/self/stat").exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_benchmark_ends_its_ranks(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", BENCH, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    ranks = [tmp_path / "0", tmp_path / "1"]
    while not all(rank.exists() and rank.read_text() for rank in ranks):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number, errors
    deadline = time.monotonic() + 20  # whoever adopts them has to see that they have ended
    while any(alive(int(rank.read_text())) for rank in ranks):
        assert time.monotonic() < deadline, "a rank lives on"
        time.sleep(0.02)
