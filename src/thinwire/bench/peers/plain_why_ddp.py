"""A plain loop with DistributedDataParallel. No thinwire here; see plain_why_pieces.py."""

import plain_why_pieces as pieces
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main():
    """Train."""
    chosen = pieces.settings()
    dist.init_process_group("gloo")
    model = DistributedDataParallel(pieces.model(chosen, dist.get_rank()), bucket_cap_mb=chosen["bucket_mb"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = pieces.Steps(chosen)
    for batch in pieces.loader(chosen):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if steps.over():
            break
    steps.finish(model.parameters())
    dist.destroy_process_group()


main()
