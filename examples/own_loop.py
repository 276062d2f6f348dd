"""A loop of plain PyTorch over a model whose layers two ranks share out; four ranks are two such replicas.

    torchrun --nproc-per-node 4 examples/own_loop.py

On a small character model and the text of Python's own standard library. The lines that make it so are marked.
"""

import inspect
import statistics
import textwrap

import torch
import torch.distributed as dist
from torch import nn

import thinwire  # (1)

STEPS, MICRO, CONTEXT, BATCH = 100, 2, 8, 64


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
    dist.init_process_group("gloo")
    text = characters()
    model = nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 256), nn.GELU(), nn.Linear(256, 128))

    shared = thinwire.apply(  # (2) this rank's stages are left in the model
        model,
        {"pipe": 2},
        batch(text, torch.Generator().manual_seed(0)),
        loss=nn.functional.cross_entropy,
        micro_batches=MICRO,
        pipeline={"activations": "int8", "gradients": "int8"},
        compress="int8",
    )
    optimizer = torch.optim.AdamW(shared.module.parameters(), lr=2e-3)  # (3) of what this rank has
    draw = torch.Generator().manual_seed(shared.replica)  # (4) ranks of a replica see the same tokens
    with shared.training(optimizer):  # (5)
        for step in range(STEPS):
            loss = shared.step([batch(text, draw) for _ in range(MICRO)])  # (6) forward, backward, averages
            optimizer.step()
            if (step + 1) % 50 == 0:
                mean = shared.mean(loss)
                if dist.get_rank() == 0:
                    print(f"step {step + 1}: loss {mean:.3f} nats per character on {shared.layout}")
        if dist.get_rank() == 0:
            for one in shared.traffic():
                print(f"{one.label} over {one.axis}: {one.calls} x {one.op} of {one.message_bytes} bytes a step")
    shared.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
