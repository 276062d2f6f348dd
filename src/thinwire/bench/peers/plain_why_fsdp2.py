"""FSDP2 (`fully_shard`), each block by itself. No thinwire here; see plain_why_pieces.py."""

import plain_why_pieces as pieces
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


def main():
    """Train."""
    chosen = pieces.settings()
    dist.init_process_group("gloo")
    model = pieces.model(chosen, dist.get_rank())
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    steps = pieces.Steps(chosen)
    for batch in pieces.loader(chosen):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if steps.over():
            break
    steps.finish([one.to_local() for one in model.parameters()])
    dist.destroy_process_group()


main()
