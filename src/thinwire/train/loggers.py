"""Scalars of a run for whoever draws curves: TensorBoard always, MLflow and Weights & Biases on request. Rank 0 writes."""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from thinwire.config.watch import Logger
from thinwire.environment import set_variables, tracking_uri
from thinwire.errors import UserError


class Board(Protocol):
    """Takes scalars by name, until it is closed."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_boards(folder: Path, loggers: Sequence[Logger], config: Mapping[str, Any]) -> list[Board]:
    """TensorBoard and `loggers`, for the run folder `folder`. config: what the run is, flat. UserError if one is missing."""
    kinds: dict[str, Callable[..., Board]] = {"mlflow": MLflow, "wandb": WeightsAndBiases}
    return [TensorBoard(folder), *(kinds[name](folder, config) for name in loggers)]


class TensorBoard:
    """Into `folder`/tensorboard, from the first scalar on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """At once."""
        self._writer = self._writer or SummaryWriter(str(self._folder / "tensorboard"))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """A run of the experiment "thinwire", named as the folder, in MLFLOW_TRACKING_URI or the file store `folder`/mlruns."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        module = _module("mlflow")
        self._metric = importlib.import_module("mlflow.entities").Metric
        if not (store := tracking_uri()):
            store = (folder / "mlruns").resolve().as_uri()
            set_variables({"MLFLOW_ALLOW_FILE_STORE": "true"})  # MLflow 3 wants to be asked for it
        self._client = module.MlflowClient(tracking_uri=store)
        found = self._client.get_experiment_by_name("thinwire")
        experiment = found.experiment_id if found else self._client.create_experiment("thinwire")
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        for name, value in config.items():
            self._client.log_param(self._run, name, value)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """In one request."""
        now_ms = int(time.time() * 1e3)
        self._client.log_batch(self._run, metrics=[self._metric(name, value, now_ms, step) for name, value in values.items()])

    def close(self) -> None:
        """The run is finished."""
        self._client.set_terminated(self._run)


class WeightsAndBiases:
    """A run of the project "thinwire", named as the folder; files in `folder`/wandb. Online or not: as its own settings say."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._run = _module("wandb").init(project="thinwire", name=folder.name, dir=str(folder), config=dict(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As one row."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until what is under way is written."""
        self._run.finish()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"watch.loggers: {name} is not installed; pip install 'thinwire[{name}]'") from None
