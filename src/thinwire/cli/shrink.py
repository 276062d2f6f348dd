"""`thinwire shrink RUN`: a trained model in fewer bytes, with its held-out loss, and its task's score, before and after."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.cli.files import check_folders, write_json
from thinwire.errors import UserError
from thinwire.units import show

if TYPE_CHECKING:
    from thinwire.compress.weights.shrink import Method, Stored
    from thinwire.train.trained import Trained


def shrink(  # noqa: PLR0913 - each is an option of the command line
    run: Annotated[Path, typer.Argument(help="A run folder, of which the newest checkpoint is taken, or one of Hugging Face.")],
    svd: Annotated[float | None, typer.Option(metavar="R", help="Keep R singular values of each matrix, or a fraction.")] = None,
    sparsity: Annotated[float | None, typer.Option(metavar="F", help="Set the fraction F of each matrix to zero.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="8 bits a weight, a scale per 256.")] = False,
    int4: Annotated[bool, typer.Option("--int4", help="4 bits a weight, a scale per 128.")] = False,
    text: Annotated[str, typer.Option(metavar="FILE", help="What a Hugging Face model is scored on; else Python's own.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the shrunk weights here.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Shrink the matrices of a trained model by one method, and print bytes, held-out loss and score before and after."""
    from thinwire.config.pretrained import is_pretrained
    from thinwire.record import RunFolder

    methods = {"--svd": svd is not None, "--sparsity": sparsity is not None, "--int8": int8, "--int4": int4}
    chosen = [option for option, given in methods.items() if given]
    if len(chosen) != 1:
        problem = f"{' and '.join(chosen)} are {len(chosen)} methods" if chosen else "no method to shrink is given"
        raise UserError(f"{problem}; give one of --svd R, --sparsity F, --int8, --int4")
    check_folders(out, json_path)
    pretrained = is_pretrained(run)
    if not pretrained:
        RunFolder.open(run)
        if text:
            raise UserError(f"--text {text}: a run is scored on its own data; leave it out")

    from thinwire.compress.weights.shrink import save_shrunk, shrink
    from thinwire.environment import read_environment
    from thinwire.train.trained import open_pretrained, open_trained

    method, what = _method(svd, sparsity, int8)
    cache_folder = read_environment().cache_folder
    trained = open_pretrained(run, text, cache_folder) if pretrained else open_trained(run, cache_folder)
    weights = dict(trained.model.named_parameters())
    stored = shrink(weights, method)
    numbers = _measure(trained, stored, what)
    numbers |= {"run": str(run), "recorded_loss": trained.recorded}
    if out:
        save_shrunk(out, stored, f"{what} of {run.resolve().name}, step {trained.step}")
        numbers |= {"file": str(out), "file_bytes": out.stat().st_size}
    if json_path:
        write_json(json_path, numbers)
    _show(numbers)


def _method(svd: float | None, sparsity: float | None, int8: bool) -> "tuple[Method, str]":
    from thinwire.compress.weights.shrink import Blocks, LowRank, Sparse

    if svd is not None:
        return LowRank(svd), f"rank {svd:g}" if svd >= 1 else f"rank {svd:g} of the smaller side"
    if sparsity is not None:
        return Sparse(sparsity), f"{sparsity:.3g} of each matrix zero"
    return (Blocks("int8"), "int8 blocks") if int8 else (Blocks("int4"), "int4 blocks")


def _measure(trained: "Trained", stored: "dict[str, Stored]", what: str) -> dict[str, Any]:
    """Bytes, losses, scores. The model is left with the weights that were read back from what is stored."""
    from thinwire.compress.weights.shrink import stored_bytes

    before = sum(weight.numel() * weight.element_size() for weight in trained.model.parameters())
    matrices = [one for one in stored.values() if len(one.shape) > 1]
    (loss, score), is_ = trained.scored(), trained.task.score_is
    numbers = {
        "what": what,
        "step": trained.step,
        "unit": trained.task.unit,
        "dtype": str(next(trained.model.parameters()).dtype).removeprefix("torch."),
        "matrices": len(matrices),
        "matrices_shrunk": sum(one.kind != "plain" for one in matrices),
        "bytes_before": before,
        "bytes_after": stored_bytes(stored),
        "loss_before": loss,
    }
    if is_ is not None:
        numbers |= {"score_name": is_.name, "score_unit": is_.unit, "score_before": score}
    trained.model.load_state_dict(trained.model.state_dict() | {name: one.dense() for name, one in stored.items()})
    loss, score = trained.scored()
    return numbers | {"loss_after": loss} | ({} if is_ is None else {"score_after": score})


def _show(numbers: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    before, after = numbers["bytes_before"], numbers["bytes_after"]
    grid, scores = Table(), "score_name" in numbers
    score = f"{numbers['score_name']}, {numbers['score_unit']}" if scores else ""
    for heading in ("weights", "bytes", "of before", "held-out loss", *[score] * scores):
        grid.add_column(heading, justify="left" if heading == "weights" else "right")
    rows = (f"step {numbers['step']}, {numbers['dtype']}", before, "before"), (numbers["what"], after, "after")
    for what, size, when in rows:
        cells = [what, show(size, "B"), f"{100 * size / before:.1f} %", f"{numbers[f'loss_{when}']:.4f}"]
        grid.add_row(*cells, *[f"{numbers[f'score_{when}']:.2f}"] if scores else [])
    console = Console()
    console.print(grid)
    lines = [
        f"loss {numbers['loss_after'] - numbers['loss_before']:+.4f} {numbers['unit']}; {before / after:.2f} times smaller; "
        f"{numbers['matrices_shrunk']} of {numbers['matrices']} matrices shrunk"
    ]
    if numbers["recorded_loss"] is not None:
        lines.append(f"the run itself recorded {numbers['recorded_loss']:.4f} at this step")
    if "file" in numbers:
        lines.append(f"wrote {numbers['file']}, {show(numbers['file_bytes'], 'B')}")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
