"""A program of two ranks: `thinwire.init` over MPI, a training step of DistributedDataParallel, the end.

mpiexec -n 2 python mpi_init.py FOLDER
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import thinwire


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 64)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ledger = thinwire.init(inner="mpi", collectives="priced", timeout=timedelta(seconds=20))
    rank, p = dist.get_rank(), dist.get_world_size()
    inputs = torch.randn(p, 64, generator=torch.Generator().manual_seed(1))
    replica, alone = torch.nn.parallel.DistributedDataParallel(net()), net()
    replica(inputs[rank : rank + 1]).square().mean().backward()
    alone(inputs).square().mean().backward()
    for own, whole in zip(replica.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own.grad, whole.grad)
    before = ledger.sent_bytes
    dist.all_reduce(torch.ones(4160))
    world = dist.group.WORLD
    chosen = [one.name for one in world._decided.values()]  # type: ignore
    found = {"size": p, "sent": ledger.sent_bytes - before, "chosen": chosen}
    (folder / f"found-{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
