"""Checkpoints of hosts that share no disk: four ranks on two hosts, each of which has a working folder of its own."""

import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_run import losses, make_config, run_training, scores

from pool import Pool, Rank
from thinwire.config.compress import Coded
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.record import RunFolder
from thinwire.train.checkpoint.disks import find_disks
from thinwire.train.checkpoint.files import Progress, examine, names
from thinwire.train.checkpoint.restore import find_checkpoint
from thinwire.train.checkpoint.saver import Saver
from thinwire.train.checkpoint.state import Parts

HOSTS = 2


def on_own_disk(context: Rank, disks: list[Path], config: RunConfig, resume: bool = False, stop_after: int = 10**9) -> str:
    """Train in the working folder of this rank's host. Returns how it ended, or the line with which it was refused."""
    before = Path.cwd()
    os.chdir(disks[context.rank * len(disks) // context.world_size])
    try:
        return run_training(context, config, Path("run") if resume else None, stop_after).reason
    except UserError as error:
        return str(error)
    finally:
        os.chdir(before)


def make_disks(base: Path) -> list[Path]:
    for host in range(HOSTS):
        (base / f"host{host}").mkdir(parents=True)
    return [base / f"host{host}" for host in range(HOSTS)]


def settings(base: Path, kind: str = "none", **train: object) -> RunConfig:
    base.mkdir(exist_ok=True)
    config = make_config(base, run="run", **train)
    return config if kind == "none" else config.model_copy(update={"compress": Coded(kind=kind)})


class Runs:
    """Of one kind: one that nobody interrupts, and one that is cut at step 6, of which tests take copies."""

    def __init__(self, ranks: Pool, base: Path, kind: str) -> None:
        self.kind, self.config = kind, settings(base / "text", kind)
        self.whole, self.cut = make_disks(base / "whole"), make_disks(base / "cut")
        assert ranks.run(on_own_disk, self.whole, self.config) == ["done"] * 4
        assert ranks.run(on_own_disk, self.cut, self.config, False, 6) == ["interrupted"] * 4

    def copy(self, to: Path) -> list[Path]:
        return [shutil.copytree(disk, to / disk.name) for disk in self.cut]

    def goes_on_as_if_uninterrupted(self, disks: list[Path]) -> bool:
        mine, theirs = disks[0] / "run", self.whole[0] / "run"
        return losses(mine) == losses(theirs) and scores(mine) == scores(theirs)


@pytest.fixture(scope="module")
def runs(ranks4: Pool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks4, tmp_path_factory.mktemp("none"), "none")


@pytest.fixture(scope="module")
def coded(ranks4: Pool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks4, tmp_path_factory.mktemp("int4"), "int4")


@pytest.mark.long
def test_each_disk_keeps_what_is_alike_and_its_own_ranks(runs: Runs) -> None:
    for number, disk in enumerate(runs.cut):
        held = examine(disk / "run" / "checkpoints" / "step-000006")
        assert held.alike and not held.damage
        assert [name for name in held.sums if name.startswith("rank-")] == [f"rank-{2 * number + one:05d}.pt" for one in (0, 1)]
        assert (disk / "run" / "run.toml").is_file() and (disk / "run" / "record.json").is_file()
        assert not [path for path in (disk / "run" / "checkpoints").iterdir() if path.name.startswith(".")], "nothing is left"


@pytest.mark.long
def test_resumed_on_the_same_disks_equals_uninterrupted(ranks4: Pool, tmp_path: Path, coded: Runs) -> None:
    disks = coded.copy(tmp_path)
    assert ranks4.run(on_own_disk, disks, coded.config, True) == ["done"] * 4
    assert coded.goes_on_as_if_uninterrupted(disks)


@pytest.mark.long
def test_parts_are_found_wherever_they_lie(ranks4: Pool, tmp_path: Path, coded: Runs) -> None:
    """The hosts have changed places; and what is alike is damaged on one of them."""
    first, second = coded.copy(tmp_path)
    victim = second / "run" / "checkpoints" / "step-000006" / "__0_0.distcp"
    victim.write_bytes(victim.read_bytes()[:100])
    shutil.copy(first / "run" / "events.jsonl", second / "run")  # rank 0 writes them, and now it is there
    assert ranks4.run(on_own_disk, [second, first], coded.config, True) == ["done"] * 4
    assert coded.goes_on_as_if_uninterrupted([second, first])


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_a_fresh_host_in_the_place_of_a_lost_one_is_given_what_it_lacks(
    ranks4: Pool, tmp_path: Path, runs: Runs, lost: int
) -> None:
    """Without residuals nothing of what is gone matters, so the run goes on as if nothing had happened."""
    disks = runs.copy(tmp_path)
    shutil.rmtree(disks[lost])
    disks[lost].mkdir()
    assert ranks4.run(on_own_disk, disks, runs.config, True) == ["done"] * 4
    wanted = {step: loss for step, loss in losses(runs.whole[0] / "run").items() if lost == 1 or step > 6}
    assert losses(disks[0] / "run") == wanted, "rank 0's disk had the events of the first steps"
    assert all(examine(disk / "run" / "checkpoints" / "step-000012").alike for disk in disks)


@pytest.mark.long
def test_with_a_second_copy_a_lost_disk_costs_nothing(ranks4: Pool, tmp_path: Path, coded: Runs) -> None:
    """What is coded leaves residuals, which are each rank's own."""
    disks, config = make_disks(tmp_path / "disks"), settings(tmp_path / "text", "int4", checkpoint_copies=2)
    assert ranks4.run(on_own_disk, disks, config, False, 6) == ["interrupted"] * 4
    shutil.rmtree(disks[1])
    disks[1].mkdir()
    assert ranks4.run(on_own_disk, disks, config, True) == ["done"] * 4
    assert coded.goes_on_as_if_uninterrupted(disks)


def found(context: Rank, disks: list[Path]) -> tuple[bool, list[str], Progress]:
    """Whether every rank has its own file, what lies on this disk then, and the progress."""
    folder = disks[context.rank * len(disks) // context.world_size] / "run" / "checkpoints"
    one = find_checkpoint(folder, find_disks(folder))
    assert not examine(one.path).damage and examine(one.path).alike
    return one.with_own, sorted(path.name for path in one.path.glob("rank-*")), one.progress


@pytest.mark.long
def test_the_others_go_on_without_a_lost_host(ranks4: Pool, ranks2: Pool, tmp_path: Path, coded: Runs) -> None:
    disks = coded.copy(tmp_path)
    (tmp_path / "fresh").mkdir()
    for with_own, files, progress in ranks4.run(found, [disks[0], tmp_path / "fresh"]):
        assert not with_own and files == ["rank-00000.pt", "rank-00001.pt"] and (progress.step, progress.world_size) == (6, 4)
    assert ranks2.run(on_own_disk, disks[:1], coded.config, True) == ["done"] * 2


def test_a_disk_that_cannot_be_written_is_said_before_the_first_step(ranks4: Pool, tmp_path: Path) -> None:
    disks = make_disks(tmp_path / "disks")
    (disks[1] / "run").write_text("a file")
    for line in ranks4.run(on_own_disk, disks, settings(tmp_path / "text")):
        assert line.startswith("rank 2 on ") and "cannot write to run/checkpoints: " in line and "\n" not in line
    assert not RunFolder(disks[0] / "run").has("record.json")


@pytest.mark.long
def test_a_disk_that_fails_while_training_goes_on_ends_the_run_in_one_line(ranks4: Pool, tmp_path: Path) -> None:
    config, disks = settings(tmp_path / "text", checkpoint_every=3), make_disks(tmp_path / "disks")
    (disks[1] / "run" / "checkpoints").mkdir(parents=True)
    (disks[1] / "run" / "checkpoints" / ".step-000006.tmp").write_text("in the way")
    lines = ranks4.run(on_own_disk, disks, config)
    assert len(set(lines)) == 1 and "step-000006 cannot be written: File exists" in lines[0], lines
    assert names(disks[1] / "run" / "checkpoints") == ["step-000003"]
    assert "step-000003" in names(disks[0] / "run" / "checkpoints"), "its part of step 6 may have been written before"


@pytest.mark.long
def test_the_clock_says_when_and_the_newest_three_stay(ranks2: Pool, tmp_path: Path) -> None:
    config, disks = settings(tmp_path / "text", checkpoint_every_s=1e-3), make_disks(tmp_path / "disks")[:1]
    assert ranks2.run(on_own_disk, disks, config) == ["done"] * 2
    events = RunFolder.open(disks[0] / "run").checkpoints()
    assert [event.step for event in events] == list(range(1, 13)), "each report found one due"
    assert names(disks[0] / "run" / "checkpoints") == ["step-000012", "step-000011", "step-000010"]
    assert all(0 < event.blocked_s < event.save_s for event in events)


def save_often(context: Rank, folder: Path, stop: Path) -> int:
    """Checkpoints without end, until `stop` is there. Returns how many."""
    from thinwire.config.sync import EveryStep
    from thinwire.sync.every_step import EveryStepSync

    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    sync = EveryStepSync(EveryStep(), "data", context.ledger)
    parts = Parts(model=model, optimizer=optimizer, sync=sync, ledger=context.ledger, rank=context.rank)
    saver = Saver(folder, find_disks(folder), keep=3)
    step, on = 0, torch.ones(1)
    while on:
        step += 1
        with torch.no_grad():
            model.weight.fill_(step)
        saver.begin(parts, Progress(step=step, tokens=step, world_size=context.world_size, assignment=(1,)))
        while saver.busy:
            time.sleep(0.001)
        saver.take()
        on.fill_(not stop.exists())
        dist.broadcast(on, 0)
    return step


@pytest.mark.long
def test_a_power_cut_at_any_moment_leaves_a_whole_checkpoint(ranks2: Pool, tmp_path: Path) -> None:
    """Imitated by copies of the folder at random moments, file by file, while checkpoints come and go."""
    folder, copies, stop = tmp_path / "checkpoints", list[Path](), tmp_path / "stop"
    chosen = random.Random(3)

    def cut() -> None:
        while not names(folder):
            time.sleep(0.001)
        for number in range(50):
            time.sleep(chosen.uniform(0, 0.03))
            copies.append(copy_of(folder, tmp_path / f"copy{number}" / "checkpoints"))
        stop.touch()

    cutter = threading.Thread(target=cut)
    cutter.start()
    assert ranks2.run(save_often, folder, stop)[0] > 3, "some are pruned meanwhile"
    cutter.join()
    for copy in copies:
        for progress, own, weight in ranks2.run(resumed_weight, copy):
            assert own and weight == progress.step


def copy_of(folder: Path, to: Path) -> Path:
    """As they are at the moment; what has another name by then is not there, as after a power cut."""
    for path in sorted(folder.iterdir(), key=lambda path: random.random()):
        (to / path.name).mkdir(parents=True, exist_ok=True)
        try:
            for file in list(path.iterdir()):
                shutil.copy(file, to / path.name / file.name)
        except FileNotFoundError:
            continue
    return to


def resumed_weight(context: Rank, folder: Path) -> Any:
    from thinwire.train.checkpoint.state import load_weights

    one = find_checkpoint(folder, find_disks(folder))
    model = torch.nn.Linear(64, 64)
    load_weights(one.path, model)
    return one.progress, one.with_own, float(model.weight[0, 0])
