"""Steps of a transformer on each rank's device, of PyTorch's methods to exchange and of ours: for `thinwire bench gpu`.

Every method trains a model of its own from the same weights; a step of each in turn, each timed from a barrier until its device
has done all of it. On GPUs over NCCL, with bfloat16 autocast. By name: none; ddp, ddp-fp16, ddp-powersgdN; a kind of
`compress_gradients`; fsdp and sharded, FSDP2 as it is and with `compress_sharded`; noneN and streamingN-KIND, N steps in a row
without an exchange and as replicas that exchange rarely.
"""

import re
import time
from contextlib import nullcontext
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.bench.peers.rank import Rank, agree
from thinwire.bench.peers.step_turns import shard
from thinwire.bench.stock_sync import ONE_BUCKET_MIB
from thinwire.bench.sync_methods import compress_section
from thinwire.config.model import preset
from thinwire.measure.compute import find_device, kind_of
from thinwire.models.transformer import Transformer

WARM_STEPS = 2
IN_A_ROW = re.compile(r"(?P<kind>none|streaming)(?P<steps>\d+)(-(?P<code>\w+))?")
SHARDED = {"gradients": "int4", "weights": "int8"}


def register(rank: Rank) -> str:
    """The stock backend of the ranks' devices."""
    return dist.get_default_backend_for_device(find_device(rank.environment.here[0]))


def measure(rank: Rank) -> dict:
    """Of each method the median step, the most memory that it takes, and how far replicas' weights end apart."""
    device, settings = find_device(rank.environment.here[0]), rank.settings
    methods = {name: Method(name, device, rank) for name in settings["methods"]}
    total = WARM_STEPS + settings["steps"]
    for turn in range(total):
        for name, method in methods.items():
            method.take_turn(turn, warm=turn >= WARM_STEPS)
            rank.report(turn * len(methods) + list(methods).index(name) + 1, total * len(methods), f"{name}, turn {turn}")
    rows = [{"method": name, **method.row()} for name, method in methods.items()]
    devices = torch.accelerator.device_count() if device.type != "cpu" else 0
    return {"device": kind_of(device), "ranks": dist.get_world_size(), "devices": devices, "methods": rows}


def wrapped(model, name, device):
    """What is run forward, and what is to be detached in the end, or None."""
    if name in ("fsdp", "sharded"):
        mesh = dist.DeviceMesh.from_group(dist.group.WORLD, device.type)
        return model, shard(model, mesh, None, SHARDED if name == "sharded" else None)
    one_bucket = name.startswith("ddp-powersgd") and device.type == "cpu"
    replica = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET_MIB if one_bucket else None, gradient_as_bucket_view=True)
    if name == "ddp-fp16":
        replica.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif name.startswith("ddp-powersgd"):
        state = powerSGD_hook.PowerSGDState(None, int(name.removeprefix("ddp-powersgd")), start_powerSGD_iter=2)
        replica.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif not name.startswith(("none", "ddp")):
        return replica, thinwire.compress_gradients(replica, **compress_section(name))
    return replica, None


class Method:
    """One model, and what was measured of it."""

    def __init__(self, name: str, device: torch.device, rank: Rank) -> None:
        self.name, self.device, self.rank, self.seconds, self.most_bytes = name, device, rank, [], 0
        before = self.allocated()
        torch.manual_seed(0)
        config = preset(rank.settings["preset"])
        self.vocabulary = config.vocabulary
        self.model, self.hold = Transformer(config).to(device), None
        self.gradient_bytes = sum(one.nbytes for one in self.model.parameters())
        in_a_row = IN_A_ROW.fullmatch(name)
        self.in_turn, self.outer = int(in_a_row["steps"]) if in_a_row else 1, None
        if in_a_row and in_a_row["kind"] == "streaming":
            self.trained = self.model
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
            options = {"kind": "streaming", "every": self.in_turn, "compress": in_a_row["code"] or "none"}
            self.outer = thinwire.DiLoCo(self.model, self.optimizer, **options)
            self.outer.__enter__()
        else:
            self.trained, self.hold = wrapped(self.model, name, device)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.step(0)
        self.wait()
        self.kept_bytes = self.allocated() - before

    def take_turn(self, number: int, *, warm: bool) -> None:
        before = self.allocated()
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self.device)
        self.wait()
        dist.barrier()
        started = time.perf_counter()
        for step in range(self.in_turn):
            self.step(number * self.in_turn + step)
        self.wait()
        if warm:
            self.seconds.append((time.perf_counter() - started) / self.in_turn)
        if self.device.type != "cpu":
            self.most_bytes = max(self.most_bytes, torch.accelerator.max_memory_allocated(self.device) - before)

    def step(self, number: int) -> None:
        shape = (self.rank.settings["micro_batch"], self.rank.settings["sequence"] + 1)
        generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
        tokens = torch.randint(self.vocabulary, shape, generator=generator).to(self.device)
        with self.trained.no_sync() if self.name.startswith("none") else nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
                loss = self.trained(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def allocated(self) -> int:
        return torch.accelerator.memory_allocated(self.device) if self.device.type != "cpu" else 0

    def row(self) -> dict:
        """Collective. peak_bytes: what it keeps, and the most that a turn takes beside."""
        if self.outer is not None:
            self.outer.__exit__(None, None, None)
        whole = [one.detach() for one in self.model.parameters()]
        flat = torch.cat([(one.full_tensor() if hasattr(one, "full_tensor") else one).flatten() for one in whole])
        first = flat.clone()
        dist.broadcast(first, 0)
        apart = (flat - first).abs().max()
        dist.all_reduce(apart, dist.ReduceOp.MAX)
        if self.hold is not None:
            self.hold.detach()
        peak_bytes = self.kept_bytes + self.most_bytes
        return {
            "step_s": agree(median(self.seconds)),
            "weights_apart": float(apart),
            "gradient_bytes": self.gradient_bytes,
            "peak_bytes": peak_bytes or None,
        }
