"""`thinwire evaluate RUN` and `thinwire predict RUN INPUT`: what a trained model scores, and what it says of an input."""

from base64 import b64decode
from pathlib import Path
from typing import Annotated, Any

import typer

from thinwire.cli.files import check_folders, write_json


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder of thinwire train; its newest checkpoint is taken.")],
    examples: Annotated[int, typer.Option(min=0, help="Held-out examples to show beside what the model says of them.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Score a trained model on the held-out part of its data, beside the baseline."""
    from thinwire.record import PICTURE, Scored

    check_folders(json_path)
    trained = _open(run)
    task, model = trained.task, trained.model
    sums = task.score(model, 0)
    numbers: dict[str, Any] = {"step": trained.step, "loss": sums[0] / sums[1], "unit": task.unit}
    typer.echo(f"step {trained.step}: held-out loss {numbers['loss']:.4f} {task.unit}")
    described, score = task.describe(), task.score_of(sums)
    if task.score_is is not None and score is not None:
        scored = Scored.model_validate(described["score"])
        numbers |= {"score": score, "score_is": described["score"]}
        typer.echo(
            f"{scored.name} {score:.2f} {scored.unit}; {scored.baseline.name}: {scored.baseline.score:.2f}; "
            f"{scored.gain(score):.2f} better, {scored.margin:g} asked: {'held' if scored.held(score) else 'not held'}"
        )
    for number, line in enumerate(task.shown(model, examples)):
        if line.startswith(PICTURE):
            _draw(run, f"held-out-{number}", b64decode(line.partition(",")[2]).decode())
        else:
            typer.echo(line)
    if json_path:
        write_json(json_path, numbers)


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder of thinwire train; its newest checkpoint is taken.")],
    given: Annotated[str, typer.Argument(metavar="INPUT", help="A text, or the path of a file, as the task takes it.")],
) -> None:
    """Print what a trained model says of one input, and draw it in the run's folder if it is a picture."""
    trained = _open(run)
    task, model = trained.task, trained.model
    typer.echo(task.predict(model, given))
    _draw(run, Path(given).stem, task.picture(model, given))


def _draw(run: Path, name: str, picture: str) -> None:
    """Into the run's folder, unless there is nothing to draw."""
    if picture:
        path = run / "pictures" / f"{name}.svg"
        path.parent.mkdir(exist_ok=True)
        path.write_text(picture, encoding="utf-8")
        typer.echo(f"  drawn in {path}")


def _open(run: Path) -> Any:
    """The model in evaluation mode, with what it needs to be used. UserError for no run folder."""
    from thinwire.record import RunFolder

    RunFolder.open(run)
    from thinwire.environment import read_environment
    from thinwire.train.trained import open_trained

    return open_trained(run, read_environment().cache_folder)
