"""Steps of a transformer under DistributedDataParallel on each rank's device: plain, with PyTorch's hooks, through our codes.

Every method trains a model of its own from the same weights; a step of each in turn, each timed from a barrier until its device
has done all of it. On GPUs over NCCL, with bfloat16 autocast.
"""

import time
from contextlib import nullcontext
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.bench.peers.rank import Rank, agree
from thinwire.bench.stock_sync import ONE_BUCKET_MIB
from thinwire.bench.sync_methods import compress_section
from thinwire.config.model import preset
from thinwire.measure.compute import find_device, kind_of
from thinwire.models.transformer import Transformer

WARM_STEPS = 3


def register(rank: Rank) -> str:
    """The stock backend of the ranks' devices."""
    return dist.get_default_backend_for_device(find_device(rank.place.local_rank))


def measure(rank: Rank) -> dict:
    """Of each method the median step, the memory that one takes while it runs, and how far replicas' weights end apart."""
    device = find_device(rank.place.local_rank)
    settings = rank.settings
    methods = {name: _Method(name, device, rank) for name in settings["methods"]}
    total = WARM_STEPS + settings["steps"]
    for step in range(total):
        for name, method in methods.items():
            method.step(step, warm=step >= WARM_STEPS)
            rank.report(step * len(methods) + list(methods).index(name) + 1, total * len(methods), f"{name}, step {step}")
    rows = [{"method": name, **method.row()} for name, method in methods.items()]
    devices = torch.accelerator.device_count() if device.type != "cpu" else 0
    return {"device": kind_of(device), "ranks": dist.get_world_size(), "devices": devices, "methods": rows}


class _Method:
    def __init__(self, name: str, device: torch.device, rank: Rank) -> None:
        self.name, self.device, self.rank, self.seconds, self.most_bytes = name, device, rank, [], 0
        torch.manual_seed(0)
        config = preset(rank.settings["preset"])
        self.vocabulary = config.vocabulary
        one_bucket = name.startswith("ddp-powersgd") and device.type == "cpu"
        self.model = DistributedDataParallel(
            Transformer(config).to(device), bucket_cap_mb=ONE_BUCKET_MIB if one_bucket else None, gradient_as_bucket_view=True
        )
        self.hold = None
        if name == "ddp-fp16":
            self.model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif name.startswith("ddp-powersgd"):
            state = powerSGD_hook.PowerSGDState(None, int(name.removeprefix("ddp-powersgd")), start_powerSGD_iter=2)
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif name not in ("none", "ddp"):
            self.hold = thinwire.compress_gradients(self.model, **compress_section(name))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, number: int, *, warm: bool) -> None:
        shape = (self.rank.settings["micro_batch"], self.rank.settings["sequence"] + 1)
        generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
        tokens = torch.randint(self.vocabulary, shape, generator=generator).to(self.device)
        on_gpu = self.device.type != "cpu"
        before = 0
        if on_gpu:
            torch.accelerator.reset_peak_memory_stats(self.device)
            before = torch.accelerator.memory_allocated(self.device)
        self.wait()
        dist.barrier()
        started = time.perf_counter()
        with self.model.no_sync() if self.name == "none" else nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
                loss = self.model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()
        if warm:
            self.seconds.append(time.perf_counter() - started)
        if on_gpu:
            self.most_bytes = max(self.most_bytes, torch.accelerator.max_memory_allocated(self.device) - before)

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def row(self) -> dict:
        """Collective."""
        flat = torch.cat([one.detach().flatten() for one in self.model.parameters()])
        first = flat.clone()
        dist.broadcast(first, 0)
        apart = (flat - first).abs().max()
        dist.all_reduce(apart, dist.ReduceOp.MAX)
        if self.hold is not None:
            self.hold.detach()
        return {"step_s": agree(median(self.seconds)), "weights_apart": float(apart), "step_bytes": self.most_bytes or None}
