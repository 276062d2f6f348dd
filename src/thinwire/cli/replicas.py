"""`thinwire replicas`: replicas that live and die alone, around servers that hold the weights."""

import tomllib
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thinwire.errors import UserError

if TYPE_CHECKING:
    from thinwire.config.replicas import Service
    from thinwire.config.run import RunConfig

Settings = Annotated[
    list[str] | None,
    typer.Option("--service", metavar="KEY=VALUE", help="merge.kind=gradients, merge.quorum=2, push.kind=int4, ..."),
]


def replicas(
    run: Annotated[Path | None, typer.Argument(help="run.toml; without it, a small model on the standard library.")] = None,
    number: Annotated[int | None, typer.Option("--replicas", min=1, help="Replicas to start; 4.")] = None,
    servers: Annotated[int | None, typer.Option(min=1, help="Servers among which the weights are cut; 1.")] = None,
    service: Settings = None,
    restart: Annotated[int, typer.Option(min=0, help="How often a replica that died is started again.")] = 1,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key: train.steps=50.")] = None,
    resume: Annotated[Path | None, typer.Option(help="The folder of an earlier run, to go on with.")] = None,
) -> None:
    """Asynchronous DiLoCo with a quorum, or a parameter server, on this machine; a replica may be killed at any time."""
    if resume is not None:
        if not (resume / "replicas-spec.json").is_file():
            raise UserError(f"--resume {resume}: no run of replicas was made there; there is no replicas-spec.json in it")
        if run or number or servers or service or changes:
            raise UserError(f"--resume {resume} goes on as that run was begun; give --restart only")
        from thinwire.train.replica_launch import launch
        from thinwire.train.replica_roles import Spec

        spec = Spec.model_validate_json((resume / "replicas-spec.json").read_text(encoding="utf-8"))
        raise typer.Exit(launch(spec.run, spec.service, spec.replicas, restart, (resume.absolute(), spec.cache)))
    config, number = _configure(run, changes or []), number or 4
    tokens = number * config.train.steps * config.train.micro_batch * config.train.sequence * config.sync.accumulate
    given = {"servers": servers or 1, "first_workers": number, "total_tokens": tokens}
    agreed = _agreed(config, given, service or [])
    folder = Path(config.train.run or f"runs/{datetime.now():%Y%m%d-%H%M%S}-replicas")
    if folder.exists():
        raise UserError(f"{folder} exists; go on with --resume {folder}, or set another train.run")

    from thinwire.environment import read_environment
    from thinwire.train.replica_launch import launch

    typer.echo(f"starting {agreed.servers} servers and {number} replicas on this machine")
    raise typer.Exit(launch(config, agreed, number, restart, (folder.absolute(), read_environment().cache_folder)))


UNUSED = (
    ("cluster", "file"),
    ("layout", "data"),
    ("layout", "outer"),
    ("train", "eval_every"),
    ("train", "checkpoint_every"),
    ("train", "ranks"),
)
"""Keys of a run that replicas do not use."""


def _configure(run: Path | None, changes: list[str]) -> "RunConfig":
    """The run, all of which replicas can do. UserError for what they cannot."""
    from thinwire.config.run import RunConfig, TrainSection, load_run

    config = load_run(run, changes)
    config.task.only_language_model("thinwire replicas")
    if config.compress.kind != "none":
        raise UserError(f"compress.kind = {config.compress.kind!r} is for ranks; replicas take --service push.kind=...")
    if config.sync.kind != "every_step":
        raise UserError(f"sync.kind = {config.sync.kind!r} is for ranks; replicas take --service merge.kind=diloco or gradients")
    if config.train.dtype == "bfloat16" and config.model.dtype != "bfloat16":
        raise UserError("train.dtype = 'bfloat16': replicas multiply in model.dtype only; leave it out")
    for key in ("updates", "on_host"):
        if (given := getattr(config.train, key)) != getattr(TrainSection(), key):
            raise UserError(f"train.{key} = {given!r} is for ranks; leave it out")
    usual, unused = RunConfig(), []
    for section, key in UNUSED:
        value = getattr(getattr(config, section), key)
        if value != getattr(getattr(usual, section), key):
            unused.append(f"{section}.{key} = {value!r}")
    if unused:
        typer.echo(f"not used by replicas: {', '.join(unused)}; --replicas sets how many, and they are scored at the end")
    return config


def _agreed(config: "RunConfig", given: dict[str, Any], settings: list[str]) -> "Service":
    """The service that is asked for; for gradients the server's optimizer is the run's."""
    from thinwire.config.replicas import Service
    from thinwire.tomlfile import validate

    content = "\n".join(_as_toml(setting) for setting in settings)
    try:
        chosen = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--service {' '.join(settings)}: {error}; write key=value, each key once") from None
    merge = chosen.setdefault("merge", {})
    if isinstance(merge, dict):
        merge.setdefault("kind", "diloco")
        if merge["kind"] == "gradients":
            merge.setdefault("learning_rate", config.train.learning_rate)
            merge.setdefault("optimizer", config.train.optimizer.model_dump())
    return validate(Service, given | chosen, "--service")


def _as_toml(setting: str) -> str:
    """A line of TOML; a value that is none by itself is text."""
    from thinwire.tomlfile import read_value

    key, _, value = setting.partition("=")
    return f'{key} = "{value}"' if read_value(value) == value else f"{key} = {value}"


def serve(
    bind: Annotated[
        str, typer.Option("--bind", "--listen", metavar="HOST:PORT", help="Where to listen, there and nowhere else.")
    ] = "127.0.0.1:29700",
    secret_file: Annotated[
        Path | None, typer.Option(help="A file with the secret that workers must know; needed beyond this machine.")
    ] = None,
    service: Settings = None,
    keep: Annotated[Path | None, typer.Option(help="A folder for what the servers hold; goes on from it if it is there.")] = None,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Answer Prometheus on loopback at this port.")] = 0,
) -> None:
    """Serve workers of your own loops (AsyncDiLoCo, ParameterServerWorker) until Ctrl-C or SIGTERM."""
    from thinwire.config.run import RunConfig
    from thinwire.train.replica_serve import serve_here

    agreed = _agreed(RunConfig(), {}, service or [])
    raise typer.Exit(serve_here(agreed, bind, keep, secret_file, metrics_port))
