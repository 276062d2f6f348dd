"""Under torchrun, a rank for each CUDA device: chosen collectives over NCCL as if each device were on a host of its own."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fixed_schedules import alone, everything, fixed
from thinwire.collectives import nccl
from thinwire.collectives.backend import NAME
from thinwire.collectives.ledger import Ledger


def main() -> None:
    rank, p = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    nccl.on_one_host = lambda place: False  # type: ignore[assignment]
    nccl.register_nccl(Ledger(), fixed())
    dist.init_process_group(NAME)
    wanted = alone(rank, p, torch.float32)
    for _ in range(3):
        for name, tensor in everything(dist.group.WORLD, torch.float32, "cuda").items():
            assert torch.equal(tensor.cpu(), wanted[name]), name
    torch.manual_seed(1)
    model = DistributedDataParallel(torch.nn.Linear(64, 64).cuda(), device_ids=[rank])
    model(torch.full((4, 64), float(rank + 1), device="cuda")).square().mean().backward()
    gradients = [torch.empty_like(model.module.weight) for _ in range(p)]
    dist.all_gather(gradients, model.module.weight.grad)
    assert all(torch.equal(one, gradients[0]) for one in gradients)
    dist.destroy_process_group()
    print(f"rank {rank} of {p} is through", file=sys.stderr)


if __name__ == "__main__":
    main()
