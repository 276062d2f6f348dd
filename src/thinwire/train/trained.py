"""A model that a run has trained, with the held-out text that the run scored it on."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from thinwire.config.run import load_run
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.record import RunFolder
from thinwire.train.checkpoint.files import newest_whole
from thinwire.train.checkpoint.state import load_weights
from thinwire.train.task import LanguageModel


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


def open_trained(run: Path, cache_folder: Path) -> Trained:
    """The newest checkpoint of a run folder, in this one process. UserError where there is none, or the data have changed."""
    folder = RunFolder.open(run)
    config = load_run(folder.path / "run.toml")
    checkpoints = folder.path / "checkpoints"
    if not list(checkpoints.glob("step-*")):
        raise UserError(f"{checkpoints} holds no checkpoint, so there are no weights; a run writes one when it ends")
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
