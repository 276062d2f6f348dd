"""`thinwire shrink` on one tiny run: losses are those of the model and of what was stored, and mistakes are one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command import one_line, thinwire
from pool import Pool, Rank
from thinwire.cli.main import app
from thinwire.compress.weights.shrink import Blocks, load_shrunk, shrink, stored_bytes
from thinwire.config.run import RunConfig
from thinwire.environment import Environment
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.record import RunFolder
from thinwire.train.runtime import StopRequest
from thinwire.train.trained import open_trained
from thinwire.train.worker import Rank as TrainingRank
from thinwire.train.worker import train_as

ROOT = Path(__file__).parents[2]


def train(context: Rank, folder: Path) -> None:
    """A run on two ranks; its scores are shared between them, those of the command are not."""
    config = RunConfig.model_validate(
        {
            "model": {"layers": 2, "width": 32, "heads": 2, "context": 32},
            "data": {"source": str(folder / "text.txt"), "cache": str(folder / "cache")},
            "train": {
                "steps": 40,
                "micro_batch": 4,
                "sequence": 32,
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "dtype": "float32",
                "eval_tokens": 512,
                "run": str(folder / "run"),
            },
        }
    )
    rank = TrainingRank(
        config=config,
        environment=Environment(place=None, lab=None, error_file=None, cache_folder=folder / "cache", results=None),
        layout=Layout(data=context.world_size),
        ledger=context.ledger,
        device=torch.device("cpu"),
        stop=StopRequest(),
    )
    train_as(rank, None)


@pytest.fixture(scope="module")
def trained(ranks2: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a run was trained. Nothing below changes it."""
    folder = tmp_path_factory.mktemp("shrink")
    (folder / "text.txt").write_text("thin wires carry small numbers slowly " * 400)
    ranks2.run(train, folder, timeout_s=50)
    return folder


def shrunk(folder: Path, *options: str) -> tuple[dict, Path]:
    """The command in this process, as it writes its numbers and its file."""
    out, numbers = folder / "out.pt", folder / "numbers.json"
    app(["shrink", "run", *options, "--out", str(out), "--json", str(numbers)], standalone_mode=False)
    return json.loads(numbers.read_text()), out


@pytest.fixture
def in_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def test_the_loss_before_is_the_one_that_the_run_recorded(in_folder: Path) -> None:
    opened = open_trained(in_folder / "run", in_folder / "cache")
    recorded = RunFolder.open("run").evals()[-1].loss
    assert opened.step == 40 and opened.recorded == recorded
    assert opened.held_out_loss() == pytest.approx(recorded, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "most_of_before"),
    [
        (["--int8"], 0.27),
        (["--int4"], 0.15),
        (["--svd", "8"], 0.6),
        (["--svd", "0.25"], 0.6),
        (["--sparsity", "0.5"], 0.55),
    ],
)
def test_the_loss_after_is_that_of_what_the_file_holds(in_folder: Path, options: list[str], most_of_before: float) -> None:
    numbers, out = shrunk(in_folder, *options)
    opened = open_trained(in_folder / "run", in_folder / "cache")
    assert numbers["loss_before"] == opened.held_out_loss()
    opened.model.load_state_dict(load_shrunk(out))
    assert numbers["loss_after"] == opened.held_out_loss() != numbers["loss_before"]
    assert numbers["bytes_after"] / numbers["bytes_before"] < most_of_before
    assert numbers["matrices_shrunk"] == numbers["matrices"] == 9
    parts = [part for one in torch.load(out, weights_only=True)["tensors"].values() for part in one["parts"].values()]
    assert numbers["bytes_after"] == sum(part.numel() * part.element_size() for part in parts)
    assert numbers["file_bytes"] == out.stat().st_size > numbers["bytes_after"]


def test_less_is_lost_with_more_bytes(in_folder: Path) -> None:
    lost = [numbers["loss_after"] - numbers["loss_before"] for numbers, _ in (shrunk(in_folder, f"--int{n}") for n in (8, 4))]
    assert abs(lost[0]) < 0.01 and abs(lost[0]) < lost[1]
    assert shrunk(in_folder, "--svd", "16")[0]["loss_after"] < shrunk(in_folder, "--svd", "2")[0]["loss_after"]


def test_the_table_says_both_losses(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, _ = shrunk(in_folder, "--int8")
    printed = capsys.readouterr().out
    assert f"{numbers['loss_before']:.4f}" in printed and f"{numbers['loss_after']:.4f}" in printed and "int8 blocks" in printed
    opened = open_trained(in_folder / "run", in_folder / "cache")
    assert numbers["bytes_after"] == stored_bytes(shrink(dict(opened.model.named_parameters()), Blocks("int8")))


def damaged(folder: Path, to: Path, change) -> None:
    shutil.copytree(folder / "run", to / "run")
    change(to / "run")


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no method to shrink is given; give one of --svd R, --sparsity F, --int8, --int4"),
        (["--svd", "4", "--int8"], "--svd and --int8 are 2 methods; give one of"),
        (["--svd", "-3"], "rank -3: give a whole number"),
        (["--sparsity", "1.5"], "sparsity 1.5: give the fraction of zeros"),
        (["--int8", "--out", "gone/s.pt"], "gone/s.pt cannot be written: there is no folder"),
        (["--int8", "--json", "run"], "run cannot be written: Is a directory"),
    ],
)
def test_wrong_options_are_one_line(in_folder: Path, options: list[str], said: str) -> None:
    with pytest.raises(UserError) as told:
        app(["shrink", "run", *options], standalone_mode=False)
    assert said in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: shutil.rmtree(run), "run does not exist"),
        (lambda run: (run / "run.toml").unlink(), "run.toml: there is no such file"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "holds no checkpoint, so there are no weights"),
        (
            lambda run: (newest(run) / "progress.json").write_text("{}"),
            "progress.json (2 bytes) does not have its checksum",
        ),
        (lambda run: next(newest(run).glob("*.distcp")).write_bytes(b"x"), "step-000040 is damaged: "),
        (lambda run: edit(run / "run.toml", "width = 32", "width = 16"), "step-000040 cannot be read: "),
        (lambda run: edit(run / "record.json", '"sha256": "', '"sha256": "0'), "text.txt' has changed since"),
    ],
)
def test_a_run_that_cannot_be_read_is_one_line(in_folder: Path, tmp_path: Path, change, said: str) -> None:
    damaged(in_folder, tmp_path, change)
    with pytest.raises(UserError) as told:
        app(["shrink", str(tmp_path / "run"), "--int8"], standalone_mode=False)
    assert said in str(told.value) and "\n" not in str(told.value)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_user_sees_one_line_and_help_needs_no_torch(tmp_path: Path) -> None:
    done = thinwire("shrink", "gone", "--int8", cwd=tmp_path)
    assert done.returncode == 2 and "run folder gone does not exist" in one_line(done.stderr)
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['shrink', '--help']; from thinwire.cli.main import main; main()"
    )
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "src", capture_output=True, text=True, timeout=30)
    assert told.returncode == 0 and "--sparsity" in told.stdout
