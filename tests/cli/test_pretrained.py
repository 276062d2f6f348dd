"""From a run to a text, to a folder for Hugging Face and back: `thinwire generate`, `thinwire export` and model.pretrained."""

import json
import shutil
from pathlib import Path

import pytest

from command import TINY_RUN, one_line, thinwire
from thinwire.record import RunFolder

RUN = (
    TINY_RUN.replace("layers = 1", "layers = 2") + 'run = "run"\nranks = 1\nsteps = 20\nlearning_rate = 1e-2\nwarmup_steps = 2\n'
)
ASK = ("--prompt", "thin wires", "--tokens", "20", "--temperature", "0.8", "--seed", "3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and its export."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text("thin wires carry small numbers slowly " * 400)
    (folder / "run.toml").write_text(RUN)
    for arguments in (("train", "run.toml"), ("export", "run", "out/model")):
        done = thinwire(*arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def generated(folder: Path, *arguments: str) -> dict:
    done = thinwire("generate", *arguments, *ASK, "--json", "it.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "it.json").read_text())
    assert done.stdout == f"thin wires{found['text']}\n"
    assert f"{len(found['found'])} tokens in " in done.stderr
    return found


@pytest.mark.long
def test_a_run_and_its_export_write_the_same_text(trained: Path) -> None:
    found = generated(trained, "run")
    assert len(found["found"]) == 20 and bytes(found["found"]).decode(errors="replace") == found["text"]
    assert generated(trained, "out/model")["found"] == found["found"]


@pytest.mark.long
@pytest.mark.parametrize("layout", ["pipe=2", "tensor=2", "pipe=2,tensor=2"])
def test_several_ranks_write_what_one_does(trained: Path, layout: str) -> None:
    assert generated(trained, "run", "--layout", layout)["found"] == generated(trained, "run")["found"]


def test_training_goes_on_from_an_exported_model(trained: Path, tmp_path: Path) -> None:
    """A learning rate that moves nothing: the held-out loss is the run's own."""
    shutil.copytree(trained / "out" / "model", tmp_path / "model")
    shutil.copy(trained / "text.txt", tmp_path)
    begin = RUN.index("[data]")
    run = '[model]\npretrained = "model"\n' + RUN[begin:].replace("steps = 20", "steps = 1").replace("1e-2", "1e-12")
    (tmp_path / "run.toml").write_text(run)
    done = thinwire("train", "run.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (RunFolder.open(folder / "run").evals()[-1].loss for folder in (trained, tmp_path))
    assert after == pytest.approx(before, rel=1e-6)


def test_an_exported_model_is_shrunk_and_scored_as_the_run_was(trained: Path) -> None:
    done = files = ("--text", "text.txt", "--out", "small.pt", "--json", "shrunk.json")
    done = thinwire("shrink", "out/model", "--int8", *files, cwd=trained)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((trained / "shrunk.json").read_text())
    assert numbers["loss_before"] == pytest.approx(RunFolder.open(trained / "run").evals()[-1].loss, rel=1e-2)
    assert numbers["loss_after"] == pytest.approx(numbers["loss_before"], rel=1e-2)
    assert 0 < numbers["matrices_shrunk"] <= numbers["matrices"]
    assert (trained / "small.pt").stat().st_size == numbers["file_bytes"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "run", "--prompt", ""), "--prompt is empty"),
        (("generate", "nothing", "--prompt", "a"), "nothing is neither a run folder"),
        (
            ("generate", "run", "--prompt", "a", "--layout", "tensor=3"),
            "layout.tensor = 3: each rank takes one head of keys and values",
        ),
        (("generate", "run", "--prompt", "a", "--layout", "data=2"), "--layout 'data=2': write pipe=2, tensor=2"),
        (
            ("generate", "run", "--prompt", "a", "--layout", "pipe=5"),
            "--layout pipe=5: a model of 2 layers has 4 units",
        ),
        (
            ("generate", "run", "--prompt", "a", "--tokens", "40"),
            "above the model's context of 32; ask for 31 tokens or fewer",
        ),
        (("export", "run", "out/model"), "out/model is there already"),
        (("export", "nothing", "out/other"), "nothing"),
        (("train", "--set", "model.pretrained=gone"), "gone/config.json cannot be read"),
        (("train", "--set", "model.pretrained=out/model", "--set", "model.preset=1m"), "give one of them"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(trained: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in one_line(thinwire(*arguments, cwd=trained).stderr)
