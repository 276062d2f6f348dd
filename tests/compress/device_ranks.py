"""Ranks that share one device, over NCCL: what an exchange delivers there against what threads deliver on CPUs, over gloo.

    python device_ranks.py RANK WORLD_SIZE PORT DEVICE KIND ..

Gradients are set, and so the same on both to the bit. With DEVICE cpu both sides go over gloo, the first one by launches.
"""

import math
import os
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from on_device import Given
from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import Exchange, make_exchange
from thinwire.compress.stages import Launches
from thinwire.config.compress import Coded
from thinwire.sync.buckets import Names
from thinwire.sync.hook import _hook
from thinwire.tomlfile import validate

SHAPES = {"first": (130, 96), "bias": (130,), "second": (64, 130), "third": (257, 33)}
LOOSE = {"powersgd": 5e-2, "svd": 1e-4, "demo": 1e-2, "sign": 1e-6, "ternary": 1e-2, "codebook2": 1e-2}
"""Kinds whose arithmetic may be rounded otherwise on a device, and by how much their results may differ."""


class Side:
    def __init__(self, device: torch.device, group: dist.ProcessGroup, kind: str, exchange: Exchange) -> None:
        self.device = device
        self.model = Given(SHAPES, device)
        self.replica = DistributedDataParallel(self.model, bucket_cap_mb=0.02, process_group=group)
        self.exchange, names = exchange, Names(self.model)
        exchange.attach(group, "data", names.shapes, device)
        self.replica.register_comm_hook((exchange, names, None), _hook)

    def step(self, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.replica.zero_grad()
        self.replica({name: values.to(self.device) for name, values in wanted.items()}).backward()
        return {name: one.grad.cpu() for name, one in self.model.named_parameters()}


def main(rank: int, world_size: int, port: int, device: torch.device, kinds: list[str]) -> None:
    os.environ |= {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    if device.type != "cpu":
        torch.accelerator.set_device_index(0)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group(dist.get_default_backend_for_device(device), store=store, rank=rank, world_size=world_size)
    gloo = dist.new_group(backend="gloo")
    for kind in kinds:
        compare(rank, world_size, gloo, device, kind)
    dist.destroy_process_group()


def compare(rank: int, world_size: int, gloo: dist.ProcessGroup, device: torch.device, kind: str) -> None:
    make = partial(make_exchange, validate(Coded, {"kind": kind, "exclude": []}, "test"), nonfinite="average")
    there = Side(device, dist.group.WORLD, kind, make(Ledger(), stages=Launches))
    here = Side(torch.device("cpu"), gloo, kind, make(Ledger()))
    for step in range(5):
        draw = torch.Generator().manual_seed(10 * step + rank)
        wanted = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        before = {name: values.cpu().clone() for name, values in there.exchange.residuals().items()}
        if step == 2 and rank == 1:
            wanted["first"][3, 4] = math.inf
        found, right = there.step(wanted), here.step(wanted)
        after = {name: values.cpu() for name, values in there.exchange.residuals().items()}
        for name, values in found.items():
            everyone = [torch.empty_like(values) for _ in range(world_size)]
            dist.all_gather(everyone, values, group=gloo)
            assert all(torch.equal(values.view(torch.int32), one.view(torch.int32)) for one in everyone), (kind, step, name)
            if step == 2:
                continue
            apart = (values - right[name]).abs().max()
            if kind in LOOSE:
                assert torch.allclose(values, right[name], atol=LOOSE[kind]), (
                    kind,
                    step,
                    name,
                    (values - right[name]).abs().max(),
                )
            else:
                assert torch.equal(values, right[name]), (kind, step, name, apart)
        if step == 2:
            assert not found["first"].isfinite().all()
            assert all(torch.equal(values, before[name]) for name, values in after.items()), "a spoiled step leaves no trace"
    for side in (there, here):
        side.exchange.detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), torch.device(sys.argv[4]), sys.argv[5:])
