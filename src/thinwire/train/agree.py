"""What the ranks must agree on before they train: run folder, data, dtype. Rank 0 decides, the others hear. All collective."""

import datetime
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.record.folder import RunFolder
from thinwire.train.runtime import Surroundings
from thinwire.train.task import LanguageModel

MATRIX_SPEEDUP = 4 / 3
"""bfloat16 is taken where it is at least this much faster."""


def agree_on_folder(config: RunConfig, resume: Path | None) -> RunFolder:
    """Rank 0 makes the run folder, or opens the one to resume."""
    path: list[Any] = [None]
    if dist.get_rank() == 0:
        wanted = resume or Path(config.train.run or datetime.datetime.now().strftime("runs/%Y%m%d-%H%M%S"))
        path = [str(RunFolder.create(wanted, resume=resume is not None).path.resolve())]
    dist.broadcast_object_list(path, 0)
    return RunFolder(Path(path[0]))


def make_task(config: RunConfig, layout: Layout, surroundings: Surroundings) -> LanguageModel:
    """Rank 0 first, so that the tokens are written once where ranks share a disk."""
    cache = Path(config.data.cache).expanduser() if config.data.cache else surroundings.cache_folder
    task = LanguageModel(config, layout, cache) if dist.get_rank() == 0 else None
    dist.barrier()
    return task or LanguageModel(config, layout, cache)


def agree_on_dtype(config: RunConfig, device: torch.device, resumed: RunFolder | None, task: LanguageModel) -> str:
    """Of the matrix products. A resumed run keeps what it had; "auto" is tried out on rank 0."""
    chosen: list[Any] = [config.train.dtype]
    if dist.get_rank() == 0 and chosen[0] == "auto":
        had = resumed.record().dtype if resumed else None
        chosen = [had or ("bfloat16" if _is_fast_in_bfloat16(device, task) else "float32")]
    dist.broadcast_object_list(chosen, 0)
    return chosen[0]


def _is_fast_in_bfloat16(device: torch.device, task: LanguageModel) -> bool:
    """Times the model's own largest matrix product both ways, the casts included."""
    matrices = [parameter for parameter in task.workload.parameters if len(parameter.shape) == 2]
    shape = max(matrices, key=lambda parameter: parameter.numel).shape
    inputs, weight = torch.randn(task.workload.tokens_per_microbatch, shape[1], device=device), torch.randn(shape, device=device)
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for dtype in [*seconds] * 3:
        started = time.perf_counter()
        torch.nn.functional.linear(inputs.to(dtype), weight.to(dtype)).float()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return seconds[torch.bfloat16] * MATRIX_SPEEDUP < seconds[torch.float32]
