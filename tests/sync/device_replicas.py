"""Two ranks that share one device, over NCCL: DiLoCo and `compress_sharded` there against the same on CPUs, over gloo.

    python device_replicas.py RANK WORLD_SIZE PORT DEVICE

Gradients are given. With DEVICE cpu both sides are on CPUs.
"""

import math
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from rarely_kinds import KINDS
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import thinwire
from on_device import Given

SHAPES = {"up": (130, 96), "norm": (130,), "down": (64, 130)}


def given(step: int, rank: int, device: torch.device) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(10 * step + rank)
    return {name: torch.randn(shape, generator=draw).to(device) for name, shape in SHAPES.items()}


def rarely(device: torch.device, group: dist.ProcessGroup, options: dict[str, Any]) -> list[torch.Tensor]:
    """What the model holds after each step and at the end, and what the state holds."""
    model = Given(SHAPES, device)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    with thinwire.DiLoCo(model, optimizer, group=group, **options) as outer:
        for step in range(9):
            optimizer.zero_grad()
            model(given(step, dist.get_rank(), device)).backward()
            optimizer.step()
            found += [one.detach().cpu() for one in model.parameters()]
        found += [one.cpu() for one in torch.utils._pytree.tree_leaves(outer.state_dict()) if isinstance(one, torch.Tensor)]
        assert outer.sent_bytes > 0
    return [*found, *(one.detach().cpu() for one in model.parameters())]


def sharded(device: torch.device, mesh: DeviceMesh, options: dict[str, Any]) -> list[torch.Tensor]:
    """Gradients and residuals of each step but the third one, which is spoiled, and weights as they are gathered."""
    model = fully_shard(Given(SHAPES, device), mesh=mesh)
    compression, found = thinwire.compress_sharded(model, **options), []
    for step in range(5):
        model.zero_grad()
        loss = model(given(step, dist.get_rank(), device))
        (loss * math.inf if step == 2 and dist.get_rank() == 1 else loss).backward()
        if step != 2:
            found += [one.grad.to_local().cpu() for one in model.parameters()]
        found += [one.cpu() for one in torch.utils._pytree.tree_leaves(compression.state_dict()) if isinstance(one, torch.Tensor)]
    with torch.no_grad():
        found.append(model(given(9, 0, device)).cpu())
    compression.detach()
    return found


def check(what: str, there: list[torch.Tensor], here: list[torch.Tensor]) -> None:
    assert len(there) == len(here), (what, len(there), len(here))
    for index, (one, other) in enumerate(zip(there, here, strict=True)):
        assert torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-5), (what, index)


def main(rank: int, world_size: int, port: int, device: torch.device) -> None:
    os.environ |= {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    if device.type != "cpu":
        torch.accelerator.set_device_index(0)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group(dist.get_default_backend_for_device(device), store=store, rank=rank, world_size=world_size)
    gloo, cpu = dist.new_group(backend="gloo"), torch.device("cpu")
    for name, options in KINDS.items():
        check(name, rarely(device, dist.group.WORLD, options), rarely(cpu, gloo, options))
    meshes = [DeviceMesh.from_group(group, where.type) for group, where in ((dist.group.WORLD, device), (gloo, cpu))]
    for options in ({}, {"gradients": "float32", "weights": "bf16"}, {"gradients": "sign", "feedback": "float32"}):
        check(str(options), sharded(device, meshes[0], options), sharded(cpu, meshes[1], options))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), torch.device(sys.argv[4]))
