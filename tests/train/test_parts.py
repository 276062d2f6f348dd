"""Checkpoints of ranks that hold parts of a model: whatever parts wrote one, any others go on with it, bit for bit."""

import random
import resource
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank
from thinwire.compress.exchange import make_exchange
from thinwire.compress.plain import PlainExchange
from thinwire.config.compress import read_coding
from thinwire.config.model import ModelConfig
from thinwire.config.run import TrainSection
from thinwire.config.sync import EveryStep
from thinwire.errors import UserError
from thinwire.models.transformer import Transformer
from thinwire.parallel.chain import Owner, chain_of
from thinwire.sync.after_backward import AfterBackwardSync
from thinwire.sync.base import Synchroniser
from thinwire.sync.local_steps import LocalStepsSync, Schedule
from thinwire.sync.outer import Nesterov
from thinwire.sync.single_rank import SingleRank
from thinwire.train.checkpoint.disks import find_disks
from thinwire.train.checkpoint.files import Progress, examine, names, newest_whole
from thinwire.train.checkpoint.restore import find_checkpoint
from thinwire.train.checkpoint.saver import Saver
from thinwire.train.checkpoint.state import Parts, load, load_weights
from thinwire.train.optimizers import make_optimizer

pytestmark = pytest.mark.heavy

Units = tuple[tuple[int, ...], ...]
WHOLE: Units = ((0, 1, 2, 3),)
"""The units of the model's chain, by part: embedding, two blocks, norm with the tied head."""
TWO: Units = ((0, 1), (2, 3))
CROSSED: Units = ((0, 2), (1, 3))
FOUR: Units = ((0,), (1,), (2,), (3,))
"""The first has no vectors, and so an empty group of the optimizer."""
ALL_CODED = {"kind": "int4", "exclude": [], "exchange": "gather"}


@dataclass
class Part:
    """What a rank has: ranks with the same part are `data` neighbours of each other, as in Layout."""

    parts: Parts
    mesh: Any
    replica: int

    def train(self, first: int, last: int) -> None:
        """With gradients that depend on the parameter, its name and the replica, and are exchanged and coded for real."""
        with self.parts.sync.attached(self.parts.model, self.parts.optimizer, self.mesh):
            for step in range(first, last):
                with self.parts.sync.microbatch(last=True):
                    for name, parameter in self.parts.model.named_parameters():
                        seed = zlib.crc32(f"{step} {self.replica} {name}".encode())
                        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                        if parameter.grad is None:
                            parameter.grad = torch.zeros_like(parameter)
                        parameter.grad.copy_(noise + parameter.detach())
                self.parts.optimizer.step()
                self.parts.sync.after_step(step)

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.parts.model, self.parts.optimizer)
        rates = {name: group["lr"] for group in optimizer["param_groups"] for name in group["params"]}
        exchange = getattr(self.parts.sync, "_exchange", None)
        residuals = exchange.residuals() if hasattr(exchange, "residuals") else {}
        flat = {f"{name} {key}": one for name, its in optimizer["state"].items() for key, one in its.items()}
        everything = {"model": model, "optimizer": flat, "residuals": residuals}
        return {key: {name: one.clone() for name, one in its.items()} for key, its in everything.items()} | {"rates": rates}


def new_model(layers: int = 2) -> Transformer:
    torch.manual_seed(3)
    return Transformer(ModelConfig(layers=layers, width=32, heads=2, vocabulary=48, context=8, tied=True, dtype="float32"))


def make_sync(context: Rank, compress: Any) -> Synchroniser:
    """compress: of gradients in every step; "diloco": replicas go alone for two steps."""
    if compress == "diloco":
        exchange, alone = PlainExchange(context.ledger), SingleRank()
        return LocalStepsSync(Schedule(every=2), Nesterov(0.7, 0.9), "data", context.ledger, exchange, alone)
    exchange = make_exchange(read_coding(compress, "compress"), context.ledger)
    return AfterBackwardSync(EveryStep(), "data", context.ledger, exchange)


def new_part(context: Rank, units: Units, compress: Any = "none", layers: int = 2) -> Part:
    replicas = context.world_size // len(units)
    mesh = init_device_mesh("cpu", (len(units), replicas), mesh_dim_names=("pipe", "data"))
    part, replica = divmod(context.rank, replicas)
    model: torch.nn.Module = new_model(layers)
    chain = chain_of(model)
    if len(units) > 1:
        model = Owner(model, [name for index in units[part] for name in chain[index].modules])
    optimizer = make_optimizer(model, TrainSection(learning_rate=0.01))
    parts = Parts(
        model=model,
        optimizer=optimizer,
        sync=make_sync(context, compress),
        ledger=context.ledger,
        rank=context.rank,
        part=part,
        num_parts=len(units),
    )
    return Part(parts, mesh, replica)


def save(part: Part, folder: Path, step: int, copies: int = 1) -> str:
    """Returns why it could not be written, "" if it was."""
    saver = Saver(folder, find_disks(folder), 9, copies, part.parts)
    saver.begin(part.parts, Progress(step=step, tokens=7, world_size=part.mesh.size(), assignment=(1,)))
    while saver.busy:
        time.sleep(0.001)
    return "" if saver.take() else saver.reason()


def trained(
    context: Rank, units: Units, folders: list[Path], steps: tuple[int, ...], compress: Any = "none", copies: int = 1
) -> Any:
    """Train, and save after each of `steps`; then two more. The states after the last save, and in the end."""
    part, done = new_part(context, units, compress), 0
    for group in part.parts.optimizer.param_groups:
        group["lr"] = 0.0625  # which only the checkpoint knows
    saved = {}
    for step in steps:
        part.train(done, step)
        assert not save(part, folders[context.rank], step, copies)
        done, saved = step, part.state()
    part.train(done, done + 2)
    return saved, part.state()


def resumed(context: Rank, units: Units, folders: list[Path], compress: Any = "none", layers: int = 2) -> Any:
    """What was found, and the states after loading and two steps later; or the line with which it was refused."""
    part = new_part(context, units, compress, layers)
    folder = folders[context.rank]
    try:
        found = find_checkpoint(folder, find_disks(folder), part.parts)
        load(found.path, part.parts, with_own=found.with_own)
    except UserError as error:
        return str(error)
    loaded, random_state = part.state(), torch.get_rng_state()
    assert not examine(found.path).damage
    part.train(found.progress.step, found.progress.step + 2)
    return found.with_own, loaded, part.state(), random_state


def saved_again(context: Rank, units: Units, folders: list[Path], to: list[Path]) -> None:
    part = new_part(context, units)
    found = find_checkpoint(folders[context.rank], find_disks(folders[context.rank]), part.parts)
    load(found.path, part.parts, with_own=found.with_own)
    assert not save(part, to[context.rank], found.progress.step)


def union(states: list[dict[str, Any]], what: tuple[str, ...] = ("model", "optimizer")) -> dict[str, torch.Tensor]:
    """Of all ranks, by name; what several have is equal."""
    found: dict[str, torch.Tensor] = {}
    for state in states:
        for name, value in (item for key in what for item in state[key].items()):
            assert torch.equal(found.setdefault(name, value), value), name
    return found


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def files(folder: Path, step: int) -> list[str]:
    return sorted(path.name for path in (folder / f"step-{step:06d}").iterdir() if path.suffix == ".pt")


@pytest.mark.parametrize("compress", ["none", ALL_CODED])
def test_resumed_with_the_same_parts_equals_uninterrupted(ranks2: Pool, ranks4: Pool, tmp_path: Path, compress: Any) -> None:
    ranks = ranks2 if compress == "none" else ranks4
    folders = [tmp_path] * ranks.world_size
    written = ranks.run(trained, TWO, folders, (2,), compress)
    assert [name for name in files(tmp_path, 2) if "part" in name] == ["part-00-of-02.pt", "part-01-of-02.pt"]
    assert not list(tmp_path.glob("step-000002/*.distcp"))
    for (saved, after), (with_own, loaded, later, _) in zip(written, ranks.run(resumed, TWO, folders, compress), strict=True):
        assert with_own and set(loaded["rates"].values()) == {0.0625}
        for before, now in ((saved, loaded), (after, later)):
            for key in ("model", "optimizer", "residuals"):
                assert_equal(before[key], now[key])
        assert bool(saved["residuals"]) == (compress != "none")


@pytest.mark.parametrize(
    ("written_by", "world", "read_by", "read_world"),
    [(WHOLE, 2, TWO, 2), (TWO, 2, WHOLE, 2), (FOUR, 4, TWO, 2), (TWO, 4, FOUR, 4), (TWO, 2, CROSSED, 2), (WHOLE, 4, FOUR, 4)],
)
def test_any_parts_go_on_with_what_any_others_wrote(
    ranks2: Pool, ranks4: Pool, tmp_path: Path, written_by: Units, world: int, read_by: Units, read_world: int
) -> None:
    pools = {2: ranks2, 4: ranks4}
    written = [saved for saved, _ in pools[world].run(trained, written_by, [tmp_path] * world, (2,))]
    read = pools[read_world].run(resumed, read_by, [tmp_path] * read_world)
    assert not any(with_own for with_own, *_ in read)
    assert_equal(union([loaded for _, loaded, *_ in read]), union(written))
    assert {rate for _, loaded, *_ in read for rate in loaded["rates"].values()} == {0.0625}


def test_there_and_back_is_the_same(ranks2: Pool, tmp_path: Path) -> None:
    whole, parts, again = ([tmp_path / name] * 2 for name in ("whole", "parts", "again"))
    written = [saved for saved, _ in ranks2.run(trained, WHOLE, whole, (2,))]
    ranks2.run(saved_again, TWO, whole, parts)
    ranks2.run(saved_again, WHOLE, parts, again)
    assert_equal(union([loaded for _, loaded, *_ in ranks2.run(resumed, WHOLE, again)]), union(written))
    expected = new_model()
    for folder in (whole[0], parts[0], again[0]):
        model = new_model()
        assert load_weights(newest_whole(folder), model).step == 2
        expected.load_state_dict(written[0]["model"])
        assert_equal(model.state_dict(), expected.state_dict())


def mean_residuals(states: list[dict[str, Any]], replicas: int) -> dict[str, torch.Tensor]:
    """1/p sum_i e_i by name; of a name that two parts have, of the first."""
    found: dict[str, torch.Tensor] = {}
    for first in range(0, len(states), replicas):
        together = [state["residuals"] for state in states[first : first + replicas]]
        for name in together[0]:
            found.setdefault(name, torch.stack([one[name] for one in together]).sum(0) / replicas)
    return found


@pytest.mark.parametrize(
    ("written_by", "world", "read_by", "read_world"),
    [(TWO, 4, WHOLE, 2), (WHOLE, 2, TWO, 4), (TWO, 4, FOUR, 4), (WHOLE, 4, TWO, 2), (TWO, 4, CROSSED, 4)],
)
def test_what_the_average_lacks_stays_the_same_when_parts_change(
    ranks2: Pool, ranks4: Pool, tmp_path: Path, written_by: Units, world: int, read_by: Units, read_world: int
) -> None:
    pools = {2: ranks2, 4: ranks4}
    written = [saved for saved, _ in pools[world].run(trained, written_by, [tmp_path] * world, (2,), ALL_CODED)]
    expected = mean_residuals(written, world // len(written_by))
    read = [loaded for _, loaded, *_ in pools[read_world].run(resumed, read_by, [tmp_path] * read_world, ALL_CODED)]
    assert all(state["residuals"].keys() <= state["model"].keys() for state in read)
    found = mean_residuals(read, read_world // len(read_by))
    assert found.keys() == expected.keys() and any("embed" in name for name in found)
    for name, residual in expected.items():
        assert residual.abs().max() > 0 and torch.allclose(found[name], residual, rtol=0, atol=1e-7), name


def outer(part: Part) -> dict[str, torch.Tensor]:
    """Anchors and outer momenta, by name."""
    found = {}
    for fragment in part.parts.sync.state_dict()["fragments"]:
        for key in ("anchor", "momentum"):
            values = fragment[key].split(fragment["sizes"])
            found |= {f"{name} {key}": value.clone() for name, value in zip(fragment["names"], values, strict=True)}
    return found


def trained_alone(context: Rank, units: Units, folder: Path, steps: int = 5) -> dict[str, Any]:
    part = new_part(context, units, "diloco")
    part.train(0, steps)
    assert not save(part, folder, steps)
    return {"outer": outer(part), "model": part.state()["model"]}


def resumed_alone(context: Rank, units: Units, folder: Path) -> tuple[bool, dict[str, Any]]:
    part = new_part(context, units, "diloco")
    found = find_checkpoint(folder, find_disks(folder), part.parts)
    load(found.path, part.parts, with_own=found.with_own)
    part.train(found.progress.step, found.progress.step)
    return found.with_own, {"outer": outer(part), "model": part.state()["model"]}


@pytest.mark.parametrize(("written_by", "read_by"), [(TWO, TWO), (TWO, FOUR), (WHOLE, TWO), (FOUR, TWO)])
def test_outer_steps_go_on_with_other_parts(ranks4: Pool, tmp_path: Path, written_by: Units, read_by: Units) -> None:
    """With the same parts each replica goes on from where it was, with others all do from the anchor."""
    written = ranks4.run(trained_alone, written_by, tmp_path)
    read = ranks4.run(resumed_alone, read_by, tmp_path)
    anchors = union([state for state in written], ("outer",))
    assert any(value.any() for name, value in anchors.items() if name.endswith("momentum"))
    assert_equal(union([state for _, state in read], ("outer",)), anchors)
    for before, (with_own, state) in zip(written, read, strict=True):
        assert with_own == (written_by == read_by)
        averaged = {name: anchors[f"{name} anchor"].view_as(values) for name, values in state["model"].items()}
        assert_equal(state["model"], before["model"] if with_own else averaged)


def test_a_parameter_that_no_part_holds_is_said(ranks2: Pool, tmp_path: Path) -> None:
    ranks2.run(trained, TWO, [tmp_path] * 2, (2,))
    for line in ranks2.run(resumed, WHOLE, [tmp_path] * 2, "none", 3):
        assert f"{tmp_path}/step-000002 holds no blocks.2." in line and "\n" not in line


def disks(base: Path, hosts: list[int]) -> list[Path]:
    """Of each rank, the folder on its host's disk."""
    return [base / f"host{host}" for host in hosts]


def test_each_disk_holds_the_parts_of_its_ranks_and_is_given_others_that_it_needs(ranks4: Pool, tmp_path: Path) -> None:
    """Hosts have one part each; then they change places; then a rank holds the whole model."""
    written = ranks4.run(trained, TWO, disks(tmp_path, [0, 0, 1, 1]), (2,))
    assert files(tmp_path / "host0", 2) == ["part-00-of-02.pt", "rank-00000.pt", "rank-00001.pt"]
    assert files(tmp_path / "host1", 2) == ["part-01-of-02.pt", "rank-00002.pt", "rank-00003.pt"]
    with pytest.raises(UserError, match=r"part-01-of-02.pt is not on this disk; copy it from the host that has it; there is no"):
        newest_whole(tmp_path / "host0")
    shutil.copytree(tmp_path, tmp_path / "again")
    for (_, after), (with_own, _, later, _) in zip(written, ranks4.run(resumed, TWO, disks(tmp_path, [1, 1, 0, 0])), strict=True):
        assert with_own
        assert_equal(union([later]), union([after]))
    read = ranks4.run(resumed, WHOLE, disks(tmp_path / "again", [0, 0, 1, 1]))
    assert_equal(union([loaded for _, loaded, *_ in read]), union([saved for saved, _ in written]))
    assert newest_whole(tmp_path / "again" / "host0").name == "step-000002"


@pytest.mark.parametrize("lost", [["part-01-of-02.pt"], ["part-01-of-02.pt", "rank-00003.pt"]])
def test_a_disk_that_lacks_a_part_is_given_it(ranks4: Pool, tmp_path: Path, lost: list[str]) -> None:
    """Each host has a replica of both parts."""
    folders = disks(tmp_path, [0, 1, 0, 1])
    written = ranks4.run(trained, TWO, folders, (2,))
    for name in lost:
        (tmp_path / "host1" / "step-000002" / name).unlink()
    read = ranks4.run(resumed, TWO, folders)
    assert all(with_own == (len(lost) == 1) for with_own, *_ in read)
    assert "part-01-of-02.pt" in files(tmp_path / "host1", 2)
    for (_, after), (_, _, later, _) in zip(written, read, strict=True):
        assert_equal(union([later]), union([after]))


@pytest.mark.long
@pytest.mark.parametrize("copies", [1, 2])
def test_a_lost_disk_costs_nothing_where_there_are_two_copies(ranks4: Pool, tmp_path: Path, copies: int) -> None:
    folders = disks(tmp_path, [0, 0, 1, 1])
    written = ranks4.run(trained, TWO, folders, (2,), ALL_CODED, copies)
    shutil.rmtree(tmp_path / "host1")
    read = ranks4.run(resumed, TWO, folders, ALL_CODED)
    if copies == 1:
        assert all("step-000002 is not whole: part-01-of-02.pt is on none of the disks; there is no" in line for line in read)
        return
    assert files(tmp_path / "host1", 2) == ["part-01-of-02.pt", "rank-00002.pt", "rank-00003.pt"], "no more than it needs"
    for (_, after), (with_own, _, later, _) in zip(written, read, strict=True):
        assert with_own
        for key in ("model", "optimizer", "residuals"):
            assert_equal(after[key], later[key])


def test_two_copies_are_not_three(ranks4: Pool, tmp_path: Path) -> None:
    """Where the next disk has written the same part itself, it is not sent to it."""
    ranks4.run(trained, TWO, disks(tmp_path, [0, 1, 0, 1]), (2,), "none", 2)
    every_file = ["part-00-of-02.pt", "part-01-of-02.pt", *(f"rank-0000{rank}.pt" for rank in range(4))]
    for host in ("host0", "host1"):
        assert files(tmp_path / host, 2) == every_file and not examine(tmp_path / host / "step-000002").damage


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_damaged_part_is_named_and_passed_over(ranks2: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks2.run(trained, TWO, [tmp_path] * 2, (1, 2))
    damage(tmp_path / "step-000002" / "part-01-of-02.pt")
    assert newest_whole(tmp_path).name == "step-000001"
    assert "step-000002 is damaged: part-01-of-02.pt (" in capsys.readouterr().out
    for with_own, loaded, *_ in ranks2.run(resumed, TWO, [tmp_path] * 2):
        assert with_own and all(step == 1 for name, step in loaded["optimizer"].items() if name.endswith(" step"))


@pytest.mark.parametrize("units", [WHOLE, TWO])
def test_a_damaged_file_of_a_rank_is_left_out(ranks4: Pool, tmp_path: Path, units: Units) -> None:
    written = ranks4.run(trained, units, [tmp_path] * 4, (2,), ALL_CODED)
    damage(tmp_path / "step-000002" / "rank-00001.pt")
    read = ranks4.run(resumed, units, [tmp_path] * 4, ALL_CODED)
    assert_equal(union([loaded for _, loaded, *_ in read]), union([saved for saved, _ in written]))
    assert not any(with_own for with_own, *_ in read)


def saved_with_a_limit(context: Rank, folder: Path) -> str:
    """Rank 1, which does not lead its disk, may not write a file as large as its part."""
    part = new_part(context, TWO)
    part.train(0, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000 if context.rank == 1 else before[0], before[1]))
    try:
        return save(part, folder, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_part_that_cannot_be_written_ends_the_save_in_one_line_on_all(ranks2: Pool, tmp_path: Path) -> None:
    first, second = ranks2.run(saved_with_a_limit, tmp_path)
    assert first == second and first and "\n" not in first
    assert names(tmp_path) == []


def with_random_state(context: Rank, folder: Path) -> torch.Tensor:
    part = new_part(context, TWO)
    part.train(0, 1)
    torch.manual_seed(random.Random(context.rank).randrange(1000))
    assert not save(part, folder, 1)
    return torch.get_rng_state()


def test_random_states_are_each_ranks_own(ranks2: Pool, tmp_path: Path) -> None:
    before = ranks2.run(with_random_state, tmp_path)
    after = [random_state for *_, random_state in ranks2.run(resumed, TWO, [tmp_path] * 2)]
    assert all(map(torch.equal, before, after)) and not torch.equal(*before)
