"""`thinwire generate MODEL --prompt TEXT`: what a trained model writes, by one rank or by several that share the model."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.cli.files import check_folders, write_json
from thinwire.cli.rank import be_rank
from thinwire.errors import UserError

if TYPE_CHECKING:
    from thinwire.data.tokenizer import Tokenizer
    from thinwire.environment import Place
    from thinwire.parallel.generate import Axes

PARTIAL = "\ufffd"
TIMEOUT_S = 300.0


def generate(
    model: Annotated[Path, typer.Argument(help="A run folder of thinwire train, or a folder as Hugging Face keeps models.")],
    prompt: Annotated[str, typer.Option(help="The text that is to go on.")],
    tokens: Annotated[int, typer.Option(min=1, help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time; above, tokens are drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="The same text for the same seed, in every layout.")] = 0,
    layout: Annotated[str, typer.Option(help="Ranks that share the model: pipe=2, tensor=2 or pipe=2,tensor=2.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write tokens, text and seconds here.")] = None,
) -> None:
    """Continue a text with a trained model, on ranks that torchrun, srun or a lab has started, else on this machine."""
    from thinwire.environment import read_environment

    if not prompt:
        raise UserError("--prompt is empty; give the text that is to go on")
    check_folders(json_path)
    options = {"prompt": prompt, "tokens": tokens, "temperature": temperature, "seed": seed}
    environment = read_environment()
    place = environment.place
    degrees = _degrees(layout)
    _check(model, **degrees)
    ranks = prod(degrees.values())
    if place is None and ranks > 1:
        raise typer.Exit(_launch(ranks, model, options | {"layout": layout} | ({"json": json_path} if json_path else {})))
    if place is None:
        _run(model, options, None, json_path)
        return
    if place.world_size != ranks:
        raise UserError(f"--layout {layout!r} is of {ranks} ranks, and {place.world_size} were started")

    def work() -> None:
        with _axes(place, degrees) as axes:
            _run(model, options, axes, json_path if place.rank == 0 else None, prints=place.rank == 0)

    be_rank(environment, work)


def _degrees(layout: str) -> dict[str, int]:
    """By axis. UserError for what is no layout."""
    found = {"pipe": 1, "tensor": 1}
    for part in filter(None, layout.split(",")):
        axis, _, degree = part.strip().partition("=")
        if axis not in found or not degree.isdigit() or not int(degree):
            raise UserError(f"--layout {layout!r}: write pipe=2, tensor=2 or pipe=2,tensor=2")
        found[axis] = int(degree)
    return found


def _check(folder: Path, pipe: int, tensor: int) -> None:
    """UserError for a model that so many ranks cannot share, before any starts."""
    from thinwire.config.model import ModelConfig
    from thinwire.config.pretrained import is_pretrained, read_shape
    from thinwire.config.run import load_run

    if not is_pretrained(folder) and not (folder / "run.toml").is_file():
        raise UserError(f"{folder} is neither a run folder, with a run.toml, nor one of Hugging Face's, with a config.json")
    if is_pretrained(folder):
        shape = ModelConfig(**read_shape(folder))
    else:
        config = load_run(folder / "run.toml")
        config.task.only_language_model("thinwire generate")
        shape = config.model.shape()
    shape.check_tensor(tensor)
    if pipe > shape.layers + 2:
        raise UserError(f"--layout pipe={pipe}: a model of {shape.layers} layers has {shape.layers + 2} units to share out")


@contextmanager
def _axes(place: "Place", degrees: dict[str, int]) -> "Iterator[Axes]":
    from torch.distributed.device_mesh import init_device_mesh

    from thinwire.collectives import backend
    from thinwire.collectives.ledger import Ledger
    from thinwire.parallel.generate import Axes
    from thinwire.train.runtime import process_group

    ledger = Ledger()
    backend.register(ledger)
    with process_group(place, backend.NAME, TIMEOUT_S):
        mesh = init_device_mesh("cpu", tuple(degrees.values()), mesh_dim_names=tuple(degrees))
        yield Axes(ledger=ledger, **{axis: mesh.get_group(axis) for axis, degree in degrees.items() if degree > 1})


def _run(model: Path, options: dict[str, Any], axes: "Axes | None", json_path: Path | None, *, prints: bool = True) -> None:
    from thinwire.parallel.generate import Generator, Sampling
    from thinwire.train.trained import open_weights

    weights = open_weights(model)
    generator = Generator(weights.model, Sampling(temperature=options["temperature"], seed=options["seed"]), axes)
    prompt, begun_s = weights.tokenizer.tokens(options["prompt"]), time.monotonic()
    tokens = generator.tokens(prompt, options["tokens"], weights.tokenizer.end)
    found = list(_shown(options["prompt"], tokens, weights.tokenizer) if prints else tokens)
    seconds = time.monotonic() - begun_s
    if prints:
        print(f"{len(found)} tokens in {seconds:.1f} s, {len(found) / seconds:.1f} a second", file=sys.stderr, flush=True)
    if json_path:
        text = weights.tokenizer.text(found)
        write_json(json_path, options | {"prompt_tokens": prompt, "found": found, "text": text, "seconds": seconds})


def _shown(prompt: str, tokens: Iterable[int], tokenizer: "Tokenizer") -> Iterator[int]:
    """The tokens; meanwhile what they say is printed behind the prompt, characters when they are whole."""
    found, printed = list[int](), ""
    print(prompt, end="", flush=True)
    for token in tokens:
        found.append(token)
        text = tokenizer.text(found)
        if not text.endswith(PARTIAL):
            print(text[len(printed) :], end="", flush=True)
            printed = text
        yield token
    print(tokenizer.text(found)[len(printed) :], flush=True)


def _launch(ranks: int, model: Path, options: dict[str, Any]) -> int:
    from thinwire.environment import environment_variables, loopback_environment

    with environment_variables({"TORCH_CPP_LOG_LEVEL": "ERROR"}):  # which torch reads when it is loaded
        from thinwire.train.agent import Nodes, launch

    arguments = [str(model), *(f"--{name}={value}" for name, value in options.items())]
    return launch(Nodes(ranks_per_node=ranks), arguments, loopback_environment(), command="generate")
