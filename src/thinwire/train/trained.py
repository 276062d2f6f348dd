"""A model that a run has trained: its weights, and the held-out text that the run scored it on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from thinwire.config.model import ModelConfig
from thinwire.config.pretrained import is_pretrained, read_shape, tokenizer_of
from thinwire.config.run import RunConfig, TrainSection, load_run
from thinwire.data.tokenizer import Tokenizer, make_tokenizer
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.models.llama import read_weights
from thinwire.models.transformer import Transformer
from thinwire.record import RunFolder
from thinwire.tomlfile import validate
from thinwire.train.checkpoint.files import newest_whole
from thinwire.train.checkpoint.state import load_weights
from thinwire.train.task import Task, new_task, shape_with


@dataclass(frozen=True, kw_only=True)
class Trained:
    """`step`: how many steps the weights have seen. `recorded`: the held-out loss that the run wrote down for them, if it did."""

    model: nn.Module
    task: Task
    step: int
    recorded: float | None

    def held_out_loss(self) -> float:
        """Of the model as it is now, on the tokens on which the run was evaluated."""
        return self.scored()[0]

    def scored(self) -> tuple[float, float | None]:
        """The same, and the task's score, where it has one."""
        sums = self.task.score(self.model, 0)
        return sums[0] / sums[1], self.task.score_of(sums)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model in this one process, on the CPU, in evaluation mode. source: the folder that its tokenizer and its shape came from,
    if it is a pretrained one; what: for people."""

    model: Transformer
    tokenizer: Tokenizer
    source: Path | None
    what: str


def open_weights(folder: Path) -> Weights:
    """Of the newest checkpoint of a run folder, or of a folder as Hugging Face keeps models. No data are read. UserError for
    another folder."""
    if is_pretrained(folder):
        model = Transformer(ModelConfig(**read_shape(folder)))
        read_weights(model, folder)
        return Weights(model=model.eval(), tokenizer=make_tokenizer(tokenizer_of(folder)), source=folder, what=str(folder))
    config, checkpoints = _opened(RunFolder.open(folder))
    config.task.only_language_model("writing and exporting")
    tokenizer, section = make_tokenizer(config.data.tokenizer), config.model
    model = Transformer(shape_with(section, tokenizer.vocabulary)).to(getattr(torch, section.dtype))
    progress = load_weights(newest_whole(checkpoints), model)
    source = Path(section.pretrained).expanduser() if section.pretrained else None
    return Weights(model=model.eval(), tokenizer=tokenizer, source=source, what=f"{folder}, step {progress.step}")


def _opened(folder: RunFolder) -> tuple[RunConfig, Path]:
    """What was run, and where its checkpoints are. UserError if there are none."""
    checkpoints = folder.path / "checkpoints"
    if not list(checkpoints.glob("step-*")):
        raise UserError(f"{checkpoints} holds no checkpoint, so there are no weights; a run writes one when it ends")
    return load_run(folder.path / "run.toml"), checkpoints


def open_pretrained(folder: Path, text: str, cache_folder: Path) -> Trained:
    """A folder as Hugging Face keeps models, to be scored on the held-out part of a text. text: as data.source; empty: the
    standard library's. UserError for a folder that cannot be read."""
    data, shape = ({"source": text} if text else {}), read_shape(folder)
    train = {"sequence": min(TrainSection().sequence, shape["context"])}
    config = validate(RunConfig, {"model": {"pretrained": str(folder)}, "data": data, "train": train}, str(folder))
    task = new_task(config, Layout(), cache_folder)
    return Trained(model=task.build_model().eval(), task=task, step=0, recorded=None)


def open_trained(run: Path, cache_folder: Path) -> Trained:
    """The newest checkpoint of a run folder, in this one process. UserError where there is none, or the data have changed."""
    folder = RunFolder.open(run)
    config, checkpoints = _opened(folder)
    task, record = new_task(config, Layout(), cache_folder), folder.record()
    if record.data is not None and record.data.sha256 != task.sha256:
        source = f"data source {str(config.data)!r}" if config.task.is_language_model else f"the data set of {config.task.kind}"
        raise UserError(
            f"{source} has changed since {folder.path} was trained (sha256 {task.sha256[:12]}, "
            f"then {str(record.data.sha256)[:12]}), so losses would not compare; bring the old data back"
        )
    model = task.build_model()
    progress = load_weights(newest_whole(checkpoints), model)
    task.settle(model)
    recorded = next((event.loss for event in folder.evals() if event.step == progress.step), None)
    return Trained(model=model.eval(), task=task, step=progress.step, recorded=recorded)
