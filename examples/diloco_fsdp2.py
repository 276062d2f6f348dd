"""DiLoCo between replicas, FSDP2 within each: a small character model on the text of Python's own standard library.

    torchrun --nproc-per-node 4 examples/diloco_fsdp2.py

Two ranks are one replica: they hold a shard of each parameter and average gradients in every step, in 4 bits. Every 20 steps each
of them exchanges with the rank of the same shard in the other replicas how far its shard went, in 4 bits too.
"""

import inspect
import statistics
import textwrap

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import thinwire

CONTEXT, BATCH, WIDTH, SHARDS = 8, 64, 192, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def characters() -> torch.Tensor:
    """A few files of the standard library as bytes, as on every machine with the same Python."""
    text = "".join(inspect.getsource(module) for module in (statistics, inspect, textwrap))
    return torch.tensor(list(text.encode("ascii", "replace")))


def batch(text: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.randint(len(text) - CONTEXT, (BATCH,), generator=draw)
    windows = text[first[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


def train(steps: int) -> str:
    torch.manual_seed(0)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // SHARDS, SHARDS), mesh_dim_names=("outer", "shard"))  # (1) who is a replica
    text = characters()
    training, held_out = text[:-8192], text[-8192:]
    mine = training.chunk(ranks)[rank]

    embedding = [nn.Embedding(128, WIDTH // CONTEXT), nn.Flatten()]
    model = nn.Sequential(*embedding, *(Block() for _ in range(3)), nn.Linear(WIDTH, 128))
    values = sum(parameter.numel() for parameter in model.parameters())
    for block in model[2:5]:
        fully_shard(block, mesh=mesh["shard"])  # (2) FSDP2 as always, within a replica
    fully_shard(model, mesh=mesh["shard"])
    inside = thinwire.compress_sharded(model, gradients="int4", weights="int8")  # (3) if the replica's own network is slow too
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(rank)

    with thinwire.DiLoCo(model, optimizer, every=20, compress="int4", group=mesh["outer"]) as outer:  # (4) between replicas
        for _ in range(steps):
            inputs, targets = batch(mine, draw)
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    inputs, targets = batch(held_out, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(inputs), targets).item()  # (5) all replicas hold the same model now
    inside.detach()
    replicas = ranks // SHARDS
    ring = steps * 2 * (replicas - 1) / replicas * 4 * values / SHARDS
    return (
        f"held-out loss {loss:.3f} nats per character after {steps} steps on each of {replicas} replicas of {SHARDS} ranks\n"
        f"sent by a rank to other replicas: {outer.sent_bytes / 1e6:.2f} MB; averaging in each step: {ring / 1e6:.2f} MB"
    )


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    said = train(steps=120)
    if dist.get_rank() == 0:
        print(said)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
