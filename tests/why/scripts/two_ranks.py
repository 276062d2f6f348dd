"""Trains with DistributedDataParallel and calls of its own, knowing nothing of thinwire; leaves the bits of its parameters."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

torch.manual_seed(0)
torch.set_num_threads(1)
dist.init_process_group("gloo")
assert dist.get_backend() == "gloo"
rank = dist.get_rank()
pair = dist.new_group([0, 1])
model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 8)), bucket_cap_mb=0.004)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
examples = torch.utils.data.DataLoader(torch.randn(160, 32).split(1)[rank::2], batch_size=4)
seen: list[object] = [None, None]
for _ in range(2):
    for batch in examples:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        largest = torch.tensor([max(float(one.grad.abs().max()) for one in model.parameters())])
        work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=pair, async_op=True)
        work.wait()
        for one in model.parameters():
            one.grad.div_(largest)
        optimizer.step()
    dist.all_gather_object(seen, rank)
assert seen == [0, 1]
bits = torch.cat([one.detach().flatten() for one in model.parameters()]).view(torch.int32)
Path(f"{sys.argv[1]}-{rank}.txt").write_text(f"{bits.tolist()} {torch.rand(1).item()}")
del model  # if it were the last to hold the group, torch 2.13 would wait for gloo's thread, and that for the interpreter's lock
dist.destroy_process_group()
