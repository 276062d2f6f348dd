"""A model that a run has trained: its weights, and the held-out text that the run scored it on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from thinwire.config.model import ModelConfig
from thinwire.config.pretrained import is_pretrained, read_shape, tokenizer_of
from thinwire.config.run import RunConfig, load_run
from thinwire.data.tokenizer import Tokenizer, make_tokenizer
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.models.llama import read_weights
from thinwire.models.transformer import Transformer
from thinwire.record import RunFolder
from thinwire.train.checkpoint.files import newest_whole
from thinwire.train.checkpoint.state import load_weights
from thinwire.train.task import LanguageModel, shape_with


@dataclass(frozen=True, kw_only=True)
class Trained:
    """`step`: how many steps the weights have seen. `recorded`: the held-out loss that the run wrote down for them, if it did."""

    model: nn.Module
    task: LanguageModel
    step: int
    recorded: float | None

    def held_out_loss(self) -> float:
        """Of the model as it is now, on the tokens on which the run was evaluated."""
        total, count = self.task.score(self.model, 0)
        return total / count


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


def open_trained(run: Path, cache_folder: Path) -> Trained:
    """The newest checkpoint of a run folder, in this one process. UserError where there is none, or the data have changed."""
    folder = RunFolder.open(run)
    config, checkpoints = _opened(folder)
    task, record = LanguageModel(config, Layout(), cache_folder), folder.record()
    if record.data is not None and record.data.sha256 != task.corpus.sha256:
        raise UserError(
            f"data source {str(config.data)!r} has changed since {folder.path} was trained (sha256 {task.corpus.sha256[:12]}, "
            f"then {str(record.data.sha256)[:12]}), so losses would not compare; bring the old text back"
        )
    model = task.build_model()
    progress = load_weights(newest_whole(checkpoints), model)
    recorded = next((event.loss for event in folder.evals() if event.step == progress.step), None)
    return Trained(model=model.eval(), task=task, step=progress.step, recorded=recorded)
