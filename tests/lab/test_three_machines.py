"""docs/three-machines.md to the letter: its commands, on three hosts as bare as Debian leaves them, one of which is killed."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from killed import KILLER
from small_cluster import build_cluster

from thinwire.lab.commands import Process
from thinwire.lab.run import LabOptions, LabResult, launch
from thinwire.record import RunFolder

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(600)]

PAGE = Path(__file__).parents[2] / "docs" / "three-machines.md"
HOSTS = 3


def on_each(disks: Path, commands: str, killed: str = "") -> LabResult:
    """Run commands of the page in the disk of each host, where its number is known."""
    processes = []
    for number in range(HOSTS):
        shell = ("bash", "-c", f"cd {disks}\nexport NUMBER={number}\n{commands}")
        host = f"host{number}"
        kill = (sys.executable, "-c", KILLER, f"{disks}/first-run/checkpoints", *shell)
        processes.append(
            Process(host, kill if host == killed else shell, {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})
        )
    cluster = build_cluster(*((f"host{number}", "switch") for number in range(HOSTS)))
    return launch(cluster, processes, LabOptions(bare=True, paced=False, disks=disks, notice_s=60))


def test_the_page_works(tmp_path: Path) -> None:
    probe, settings, train, resume = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    for number in range(HOSTS):
        shutil.copytree(Path(re.__file__).parent, tmp_path / f"host{number}" / "text", ignore=shutil.ignore_patterns("*.pyc"))
    assert on_each(tmp_path, probe).failure is None
    for number in (1, 2):
        shutil.copy(tmp_path / "host0" / "cluster.toml", tmp_path / f"host{number}")
    broken = on_each(tmp_path, settings + train, killed="host2")
    assert all(broken.exit_codes.values())
    folder = RunFolder(tmp_path / "host0" / "first-run")
    before = max(event.step for event in folder.steps())
    assert 20 <= before < 60
    assert on_each(tmp_path, resume).failure is None
    assert folder.resumes() and max(event.step for event in folder.steps()) == 60
