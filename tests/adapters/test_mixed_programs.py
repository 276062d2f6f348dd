"""An example in which others do a part: TensorFlow's MirroredStrategy and mpi4py run beside us."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import launched
from pool import LOOPBACK

EXAMPLES = Path(__file__).parents[2] / "examples"
MISSING = [name for name in ("keras", "tensorflow") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.long,  # to load TensorFlow takes each rank some ten seconds
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed"),
]


def printed(command: list[str]) -> str:
    environment = launched.environment() | {"GLOO_SOCKET_IFNAME": LOOPBACK}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent / "src"), environment["PYTHONPATH"]])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.skipif(bool(launched.MISSING), reason=launched.MISSING)
def test_mirrored_devices_of_a_host_and_mpi_between_hosts() -> None:
    """Hosts hold the same weights to the bit, which the example itself asserts; int8 sends a quarter, and scales."""
    sent = {}
    for kind in ("none", "int8"):
        command = [launched.mpiexec(), "-n", "2", sys.executable, str(EXAMPLES / "mirrored_mpi.py")]
        out = printed([*command, "--steps", "200", "--compression", kind])
        found = re.search(r"2 hosts of 2 devices \(ReductionToOneDevice\): .*accuracy (\S+) %, sent by a host: (\S+) MB", out)
        assert found, out
        assert float(found[1]) > 70
        sent[kind] = float(found[2])
    assert sent["int8"] < 0.35 * sent["none"]
