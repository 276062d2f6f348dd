"""What a device computes, measured on a training step; and how much memory it has.

The rate is that of forward and backward of a small transformer (flops counted as in `thinwire.workload`) without the
optimizer and without any exchange, while every rank of the probe does the same: ranks that share a machine share its
cores, its GPUs and its memory. A large matrix product is timed as well; it is the ceiling, not what training achieves. And the
copy of a large buffer: an optimizer does little else than read and write. All of it warm: on a device first steps compile, and
choose kernels.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from thinwire.config.model import preset
from thinwire.measure.memory import total_memory
from thinwire.models.transformer import Transformer
from thinwire.workload import Workload

STEP_S = 1.2
MIN_STEPS = 3
WARM_STEPS = 5
"""On a device; one on the CPU."""
MATMUL_S = 0.4
COPIES = 8
BFLOAT16_PAYS_BELOW = 0.75


@dataclass(frozen=True, slots=True)
class Computed:
    """Of one rank: flop/s of each timed training step, and of a matrix product; bytes that a copy reads and writes."""

    steps_flops_per_s: tuple[float, ...]
    matmul_flops_per_s: float
    memory_bytes_per_s: float


def find_device(number: int, *, alone: bool = False) -> torch.device:
    """A GPU if this torch has CUDA, by the rank's number on this machine modulo theirs, else the CPU with one thread a rank.

    alone: no other rank needs a core.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", number % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if not alone:
        torch.set_num_threads(1)
    return torch.device("cpu")


def shared_gpus(ranks: int) -> str:
    """A line about so many ranks on this machine; "" where each has a GPU of its own, or there is none."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"{ranks} ranks share {gpus} GPU{'s' * (gpus > 1)}" if 0 < gpus < ranks else ""


def kind_of(device: torch.device) -> str:
    """ "cpu", or the name of the GPU."""
    return "cpu" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))


def memory_bytes(device: torch.device, ranks_on_host: int) -> float:
    """The card's, or an even share of the host's, limited by its control group."""
    if device.type == "cpu":
        return total_memory() / ranks_on_host
    return float(torch.get_device_module(device).get_device_properties(device).total_memory)


def fast_dtype(device: torch.device, product: tuple[int, int, int] | None = None) -> str:
    """bfloat16 if it makes a matrix product at least a third faster here, the casts from float32 weights included.

    product: (rows, inner, columns); by default a square one that keeps the device busy.
    """
    rows, inner, columns = product or (_side(device),) * 3
    a, b = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for dtype in [*seconds] * 6:
        started = time.perf_counter()
        (a.to(dtype) @ b.to(dtype)).float()
        _wait(device)
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return "bfloat16" if seconds[torch.bfloat16] < BFLOAT16_PAYS_BELOW * seconds[torch.float32] else "float32"


def compute(device: torch.device, dtype: str, barrier: Callable[[], None]) -> Computed:
    """Time training steps, then matrix products, all ranks at once. Collective through `barrier`."""
    on_cpu = device.type == "cpu"
    config = preset("1m" if on_cpu else "124m")
    micro_batch, sequence = (2, 256) if on_cpu else (8, 512)
    flops = Workload.of_transformer(config, micro_batch, sequence).flops_per_microbatch
    model = Transformer(config).to(device)
    tokens = torch.randint(config.vocabulary, (micro_batch, sequence + 1), device=device)
    precision = torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()

    def step() -> None:
        with precision:
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        _wait(device)

    barrier()
    for _ in range(1 if on_cpu else WARM_STEPS):
        step()
    rates: list[float] = []
    begun = time.perf_counter()
    while len(rates) < MIN_STEPS or time.perf_counter() - begun < STEP_S:
        started = time.perf_counter()
        step()
        rates.append(flops / (time.perf_counter() - started))
    barrier()
    matmul = _matmul_flops_per_s(device, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    barrier()
    return Computed(tuple(rates), matmul, copy_bytes_per_s(device))


def copy_bytes_per_s(device: torch.device) -> float:
    """The fastest of some copies of a buffer that no cache holds, read and written."""
    source = torch.ones(2**25 if device.type == "cpu" else 2**27, device=device)
    target, fastest_s = source.clone(), float("inf")
    for _ in range(COPIES):
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        fastest_s = min(fastest_s, time.perf_counter() - started)
    return 2 * source.nbytes / fastest_s


def _matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.randn(_side(device), _side(device), device=device).to(dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2.0 * _side(device) ** 3 / timer.blocked_autorange(min_run_time=MATMUL_S).mean


def _side(device: torch.device) -> int:
    return 512 if device.type == "cpu" else 4096


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
