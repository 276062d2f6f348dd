"""Plain DistributedDataParallel on collectives chosen for the network: one line differs from stock PyTorch.

    torchrun --nproc-per-node 4 examples/chosen_collectives.py [CLUSTER.toml]

With a cluster file (`thinwire probe` writes one) ways to run each collective are priced on its links; those that look best are
measured when they are first needed, and what wins is kept beside the file for the next run.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire


def main(cluster: str | None = None) -> None:
    torch.set_num_threads(1)
    ledger = thinwire.init(cluster)  # instead of dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    draw = torch.Generator().manual_seed(dist.get_rank())
    for step in range(20):
        batch = torch.randn(32, 64, generator=draw)
        loss = (model(batch) - batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}, {ledger.sent_bytes / 1e6:.1f} MB sent", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
