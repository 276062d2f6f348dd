"""`thinwire.init(inner="mpi")` in a program that mpiexec has started; settings of init that do not exist."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import thinwire
from launched import MISSING, environment, mpiexec
from thinwire.errors import UserError

PROGRAM = Path(__file__).with_name("mpi_init.py")


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.timeout(120)
def test_ranks_of_mpiexec_train_on_schedules_and_end(tmp_path: Path) -> None:
    command = [mpiexec(), "-n", "2", sys.executable, str(PROGRAM), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=110, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    found: list[dict[str, Any]] = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(2)]
    assert found[0] == found[1] and found[0]["size"] == 2
    assert set(found[0]["chosen"]) - {"native"} and found[0]["sent"] == 4 * 4160


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"inner": "tcp"}, "inner = 'tcp'; there are 'gloo', 'mpi'"),
        ({"collectives": "best"}, "collectives = 'best'; there are 'measured', 'priced', 'native'"),
        ({"cluster": "nowhere"}, "there is no cluster 'nowhere'"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_starts(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        thinwire.init(**settings)
