"""`thinwire shrink RUN`: a trained model in fewer bytes, with its held-out loss before and after."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.cli.files import check_folders, write_json
from thinwire.errors import UserError
from thinwire.units import show

if TYPE_CHECKING:
    from thinwire.compress.weights.shrink import Method, Stored
    from thinwire.train.trained import Trained


def shrink(
    run: Annotated[Path, typer.Argument(help="A run folder of thinwire train; its newest checkpoint is taken.")],
    svd: Annotated[float | None, typer.Option(metavar="R", help="Keep R singular values of each matrix, or a fraction.")] = None,
    sparsity: Annotated[float | None, typer.Option(metavar="F", help="Set the fraction F of each matrix to zero.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="8 bits a weight, a scale per 256.")] = False,
    int4: Annotated[bool, typer.Option("--int4", help="4 bits a weight, a scale per 128.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the shrunk weights here.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Shrink the matrices of a trained model by one method, and print bytes and held-out loss before and after."""
    from thinwire.record import RunFolder

    methods = {"--svd": svd is not None, "--sparsity": sparsity is not None, "--int8": int8, "--int4": int4}
    chosen = [option for option, given in methods.items() if given]
    if len(chosen) != 1:
        problem = f"{' and '.join(chosen)} are {len(chosen)} methods" if chosen else "no method to shrink is given"
        raise UserError(f"{problem}; give one of --svd R, --sparsity F, --int8, --int4")
    check_folders(out, json_path)
    RunFolder.open(run)

    from thinwire.compress.weights.shrink import save_shrunk, shrink
    from thinwire.environment import read_environment
    from thinwire.train.trained import open_trained

    method, what = _method(svd, sparsity, int8)
    trained = open_trained(run, read_environment().cache_folder)
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
    """Bytes and losses. The model is left with the weights that were read back from what is stored."""
    from thinwire.compress.weights.shrink import stored_bytes

    before = sum(weight.numel() * weight.element_size() for weight in trained.model.parameters())
    matrices = [one for one in stored.values() if len(one.shape) > 1]
    numbers = {
        "what": what,
        "step": trained.step,
        "unit": trained.task.unit,
        "dtype": str(next(trained.model.parameters()).dtype).removeprefix("torch."),
        "matrices": len(matrices),
        "matrices_shrunk": sum(one.kind != "plain" for one in matrices),
        "bytes_before": before,
        "bytes_after": stored_bytes(stored),
        "loss_before": trained.held_out_loss(),
    }
    trained.model.load_state_dict({name: one.dense() for name, one in stored.items()})
    return numbers | {"loss_after": trained.held_out_loss()}


def _show(numbers: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    before, after = numbers["bytes_before"], numbers["bytes_after"]
    grid = Table()
    for heading in ("weights", "bytes", "of before", "held-out loss"):
        grid.add_column(heading, justify="left" if heading == "weights" else "right")
    grid.add_row(f"step {numbers['step']}, {numbers['dtype']}", show(before, "B"), "100 %", f"{numbers['loss_before']:.4f}")
    grid.add_row(numbers["what"], show(after, "B"), f"{100 * after / before:.1f} %", f"{numbers['loss_after']:.4f}")
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
