"""What the ranks must agree on before they train: run folder, data, dtype. Rank 0 decides, the others hear. All collective."""

import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.measure.compute import fast_dtype
from thinwire.record import RunFolder
from thinwire.train.runtime import Environment
from thinwire.train.task import LanguageModel


def agree_on_folder(config: RunConfig, resume: Path | None) -> RunFolder:
    """Rank 0 makes the run folder, or opens the one to resume."""
    path: list[Any] = [None]
    if dist.get_rank() == 0:
        wanted = resume or Path(config.train.run or datetime.datetime.now().strftime("runs/%Y%m%d-%H%M%S"))
        path = [str(RunFolder.create(wanted, resume=resume is not None).path.resolve())]
    dist.broadcast_object_list(path, 0)
    return RunFolder(Path(path[0]))


def make_task(config: RunConfig, layout: Layout, environment: Environment) -> LanguageModel:
    """Rank 0 first, so that the tokens are written once where ranks share a disk."""
    cache = Path(config.data.cache).expanduser() if config.data.cache else environment.cache_folder
    task = LanguageModel(config, layout, cache) if dist.get_rank() == 0 else None
    dist.barrier()
    return task or LanguageModel(config, layout, cache)


def agree_on_dtype(config: RunConfig, device: torch.device, resumed: RunFolder | None, task: LanguageModel) -> str:
    """Of the matrix products. A resumed run keeps what it had; "auto" is tried out on rank 0."""
    chosen: list[Any] = [config.train.dtype]
    if dist.get_rank() == 0 and chosen[0] == "auto":
        had = resumed.record().dtype if resumed else None
        chosen = [had or fast_dtype(device, _largest_product(task))]
    dist.broadcast_object_list(chosen, 0)
    return chosen[0]


def _largest_product(task: LanguageModel) -> tuple[int, int, int]:
    """Of one micro-batch: tokens, inputs and outputs of the model's largest matrix."""
    matrices = [parameter for parameter in task.workload.parameters if len(parameter.shape) == 2]
    outputs, inputs = max(matrices, key=lambda parameter: parameter.numel).shape
    return task.workload.tokens_per_microbatch, inputs, outputs
