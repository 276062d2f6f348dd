"""A module of Lightning and its Trainer. No thinwire here; see plain_why_pieces.py."""

import os

import lightning
import plain_why_pieces as pieces
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy


class Module(lightning.LightningModule):
    """The model of the pieces, made when ranks know who they are."""

    def __init__(self, chosen):
        super().__init__()
        self.chosen, self.steps = chosen, pieces.Steps(chosen)

    def configure_model(self):
        self.model = pieces.model(self.chosen, self.global_rank)

    def training_step(self, batch, number):
        return self.model(batch).square().mean()

    def on_train_batch_end(self, outputs, batch, number):
        self.steps.over()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main():
    """Train. Lightning reads how many ranks there are from its own arguments."""
    chosen = pieces.settings()
    ranks = int(os.environ["WORLD_SIZE"])
    os.environ.setdefault("TORCHELASTIC_RUN_ID", "why")  # so that it takes the ranks as they are, as under torchrun
    module = Module(chosen)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=ranks // int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_steps=chosen["steps"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, pieces.loader(chosen))
    module.steps.finish(module.parameters())
    if dist.is_initialized():
        dist.destroy_process_group()


main()
