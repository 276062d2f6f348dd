"""Transformers' Trainer with gradients in 4 bits: a small GPT-2 from a configuration, on the text of Python's own library.

    torchrun --nproc-per-node 2 examples/trainer_int4.py

Against the stock script there are four more lines, which are marked.
"""

import inspect
import statistics
import textwrap

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import thinwire  # (1)
from thinwire.adapters.transformers import attach  # (2)

CONTEXT = 64


def windows() -> list[dict[str, torch.Tensor]]:
    """A few files of the standard library as bytes, cut into windows."""
    text = "".join(inspect.getsource(module) for module in (statistics, inspect, textwrap))
    tokens = torch.tensor(list(text.encode("ascii", "replace")))
    return [{"input_ids": piece, "labels": piece} for piece in tokens.unfold(0, CONTEXT, CONTEXT)]


def main(steps: int = 60) -> None:
    ledger = thinwire.init(collectives="native")  # (3)
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_positions": CONTEXT, "n_embd": 128, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    args = TrainingArguments(
        output_dir="runs/trainer",
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=20,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        report_to=[],
    )
    trainer = Trainer(model=model, args=args, train_dataset=windows())
    attach(trainer, compress="int4")  # (4)
    trainer.train()
    if trainer.is_world_process_zero():
        print(f"sent by a rank: {ledger.sent_bytes / 1e6:.1f} MB in {steps} steps")


if __name__ == "__main__":
    main()
