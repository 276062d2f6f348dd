"""[watch]: who is told of a run beside the terminal, the run folder and TensorBoard."""

from typing import Literal

from pydantic import Field

from thinwire.tomlfile import Section

Logger = Literal["mlflow", "wandb"]


class WatchSection(Section):
    """All of it is off unless asked for."""

    loggers: tuple[Logger, ...] = ()
    """"mlflow": into RUN/mlruns, or where MLFLOW_TRACKING_URI says; "wandb": Weights & Biases, as its own settings say. Each
    is an extra of the same name."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Each rank answers Prometheus on loopback at this port plus its number on the host; 0: none does."""
    timeline_steps: int = Field(0, ge=0)
    """The first so many steps go into RUN/timeline.json, for Perfetto or chrome://tracing; 0: there is none."""
