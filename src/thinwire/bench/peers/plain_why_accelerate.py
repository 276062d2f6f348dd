"""A loop with Accelerate: it sums gradients itself after the backward pass, or with `overlap` leaves that to prepare().

No thinwire here; see plain_why_pieces.py.
"""

import plain_why_pieces as pieces
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs


def main():
    """Train."""
    chosen = pieces.settings()
    options = DistributedDataParallelKwargs(bucket_cap_mb=chosen["bucket_mb"])
    accelerator = Accelerator(cpu=True, kwargs_handlers=[options])
    model = pieces.model(chosen, accelerator.process_index)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader, optimizer = accelerator.prepare(pieces.loader(chosen), optimizer)
    trained = accelerator.prepare(model) if chosen["overlap"] else model
    steps = pieces.Steps(chosen)
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(trained(batch).square().mean())
        if not chosen["overlap"]:
            flat = torch.cat([one.grad.flatten() for one in model.parameters()])
            flat = accelerator.reduce(flat, "mean")
            for one, part in zip(model.parameters(), flat.split([one.numel() for one in model.parameters()]), strict=True):
                one.grad.copy_(part.view_as(one))
        optimizer.step()
        if steps.over():
            break
    steps.finish(model.parameters())
    dist.destroy_process_group()


main()
