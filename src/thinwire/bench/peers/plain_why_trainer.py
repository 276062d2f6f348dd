"""The Trainer of transformers. No thinwire here; see plain_why_pieces.py."""

import tempfile

import plain_why_pieces as pieces
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments


class Scored(nn.Module):
    """What Trainer wants: a model that takes the columns of a batch and gives its loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, values):
        return {"loss": self.model(values).square().mean()}


class Noted(TrainerCallback):
    """A step is over."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **others):
        self.steps.over()


def main():
    """Train."""
    chosen = pieces.settings()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="why-"),
        max_steps=chosen["steps"],
        per_device_train_batch_size=chosen["batch"],
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    arguments.device  # noqa: B018 - makes the process group
    model, steps = Scored(pieces.model(chosen, dist.get_rank())), pieces.Steps(chosen)

    def batched(rows):
        return {"values": torch.stack(rows)}

    trainer = Trainer(
        model=model, args=arguments, train_dataset=pieces.Examples(chosen), data_collator=batched, callbacks=[Noted(steps)]
    )
    trainer.train()
    steps.finish(model.parameters())
    dist.destroy_process_group()


main()
