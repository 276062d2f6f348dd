"""The example runs as torchrun starts it, and its ranks see other words."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "lstm_accumulation.py"
SMALL = "--steps 2 --accumulate 2 --words 500 --embedding 16 --hidden 16 --compression int4"


@pytest.mark.long
@pytest.mark.timeout(170)
def test_the_sketch_of_an_lstm_runs_on_two_ranks_with_codes() -> None:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([sys.executable, *start, str(EXAMPLE), *SMALL.split()], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step")] == ["1/2", "2/2"]
