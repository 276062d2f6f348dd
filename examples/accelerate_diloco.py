"""Accelerate with DiLoCo: replicas train alone, and every 10 steps exchange in 4 bits how far they went.

    torchrun --nproc-per-node 2 examples/accelerate_diloco.py

Against the stock script there are five more lines, which are marked.
"""

import torch
from accelerate import Accelerator
from torch import nn
from trainer_int4 import CONTEXT, windows
from transformers import GPT2Config, GPT2LMHeadModel

import thinwire  # (1)
from thinwire.adapters.accelerate import attach  # (2)


def main(steps: int = 60) -> None:
    thinwire.init(collectives="native")  # (3)
    accelerator = Accelerator(cpu=True)
    door = attach(accelerator, sync="diloco", every=10, compress="int4")  # (4)
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_positions": CONTEXT, "n_embd": 128, "n_layer": 4, "n_head": 4}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = torch.utils.data.DataLoader(windows(), batch_size=8, shuffle=True)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = 0
    while step < steps:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                accelerator.print(f"step {step}: loss {loss.item():.3f}")
            if step == steps:
                break
    door.finish()  # (5) all ranks hold the same model now
    accelerator.print(f"sent by a rank: {door.ledger.sent_bytes / 1e6:.1f} MB in {steps} steps")


if __name__ == "__main__":
    main()
