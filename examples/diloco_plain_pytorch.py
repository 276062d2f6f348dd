"""DiLoCo in a training loop of plain PyTorch: a small character model on the text of Python's own standard library.

    torchrun --nproc-per-node 2 examples/diloco_plain_pytorch.py

Each rank trains its own replica; every 20 steps they exchange how far they went, in 4 bits. The lines that make it so are marked.
"""

import inspect
import statistics
import textwrap

import torch
import torch.distributed as dist
from torch import nn

import thinwire  # (1)

STEPS, CONTEXT, BATCH = 400, 8, 128


def characters() -> torch.Tensor:
    """A few files of the standard library as bytes, as on every machine with the same Python."""
    text = "".join(inspect.getsource(module) for module in (statistics, inspect, textwrap))
    return torch.tensor(list(text.encode("ascii", "replace")))


def batch(text: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.randint(len(text) - CONTEXT, (BATCH,), generator=draw)
    windows = text[first[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")  # (2)
    text = characters()
    training, held_out = text[:-8192], text[-8192:]
    mine = training.chunk(dist.get_world_size())[dist.get_rank()]  # (3) each replica its own share

    model = nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 256), nn.GELU(), nn.Linear(256, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(dist.get_rank())

    with thinwire.DiLoCo(model, optimizer, every=20, compress="int4") as outer:  # (4) and the loop below it indented
        for _ in range(STEPS):
            inputs, targets = batch(mine, draw)
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    inputs, targets = batch(held_out, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(inputs), targets).item()
    if dist.get_rank() == 0:  # (5) all ranks hold the same model now
        replicas = dist.get_world_size()
        print(f"held-out loss {loss:.3f} nats per character after {STEPS} steps on each of {replicas} replicas")
        ring = STEPS * 2 * (replicas - 1) / replicas * 4 * sum(parameter.numel() for parameter in model.parameters())
        print(f"sent by a rank: {outer.sent_bytes / 1e6:.2f} MB; averaging gradients in each step: {ring / 1e6:.2f} MB")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
