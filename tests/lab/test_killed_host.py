"""Hosts whose disks nobody shares: one is killed while they train, and comes back with its disk, or without, or not at all."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from killed import KILLER
from small_cluster import build_cluster

from thinwire.cluster import Cluster
from thinwire.lab.commands import processes_for
from thinwire.lab.run import LabOptions, LabResult, launch
from thinwire.record import RunFolder
from thinwire.train.checkpoint.files import examine, names

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(400)]

RUN = """
[model]
layers = 2
width = 32
heads = 2
context = 32
[compress]
kind = "int4"
[train]
steps = 24
micro_batch = 1
sequence = 32
eval_tokens = 256
eval_every = 0
log_every = 1
checkpoint_every = 4
timeout_s = 10
run = "{disks}/run"
"""


def hosts(number: int) -> Cluster:
    return build_cluster(*((f"host{index}", "switch") for index in range(number)))


def train(cluster: Cluster, disks: Path, *argv: str, killed: str = "") -> LabResult:
    processes = [
        replace(one, argv=(sys.executable, "-c", KILLER, f"{disks}/run/checkpoints", *one.argv)) if one.host == killed else one
        for one in processes_for(cluster, ("thinwire", "train", *argv))
    ]
    return launch(cluster, processes, LabOptions(bare=True, paced=False, disks=disks, notice_s=20))


def losses(disks: Path) -> dict[int, float]:
    return {event.step: event.loss for event in RunFolder.open(disks / "host0" / "run").steps()}


@pytest.mark.parametrize("number", [2, 4])
def test_a_host_is_killed_and_the_run_goes_on(tmp_path: Path, number: int) -> None:
    cluster, last, whole, cut = hosts(number), f"host{number - 1}", tmp_path / "whole", tmp_path / "cut"
    for disks in (whole, cut):
        for host in cluster.hosts:
            (disks / host.name).mkdir(parents=True)
            (disks / host.name / "run.toml").write_text(RUN.format(disks=disks))
    assert train(cluster, whole, f"{whole}/run.toml").failure is None
    broken = train(cluster, cut, f"{cut}/run.toml", killed=last)
    assert broken.exit_codes[last] == 137 and broken.exit_codes["host0"] == 1, "the others lost it"
    assert max(losses(cut)) < 24 and len(names(cut / last / "run" / "checkpoints")) >= 2

    copies = {name: shutil.copytree(cut, tmp_path / name) for name in ("fresh", "without")}
    assert train(cluster, cut, "--resume", f"{cut}/run").failure is None
    assert losses(cut) == losses(whole), "as if nothing had happened"

    shutil.rmtree(copies["fresh"] / last)
    assert train(cluster, copies["fresh"], "--resume", f"{copies['fresh']}/run").failure is None
    assert max(losses(copies["fresh"])) == 24 and examine(copies["fresh"] / last / "run" / "checkpoints" / "step-000024").alike

    if number > 2:
        smaller = hosts(number - 1)
        assert train(smaller, copies["without"], "--resume", f"{copies['without']}/run").failure is None
        assert max(losses(copies["without"])) == 24
