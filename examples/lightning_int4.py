"""Lightning with gradients in 4 bits: a strategy in place of "ddp".

    torchrun --nproc-per-node 2 examples/lightning_int4.py

Against the stock script there is one more line and another strategy, which are marked.
"""

import lightning.pytorch as pl
import torch
from trainer_int4 import CONTEXT, windows
from transformers import GPT2Config, GPT2LMHeadModel

from thinwire.adapters.lightning import ThinwireStrategy  # (1)


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 128, "n_positions": CONTEXT, "n_embd": 128, "n_layer": 4, "n_head": 4}
        self.net = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(**batch).loss
        if index % 20 == 19 and self.global_rank == 0:
            print(f"step {index + 1}: loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(steps: int = 60) -> None:
    pl.seed_everything(0, verbose=False)
    loader = torch.utils.data.DataLoader(windows(), batch_size=8, shuffle=True)  # type: ignore[arg-type, var-annotated]
    strategy = ThinwireStrategy(compress="int4")  # (2)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,  # "ddp"
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), loader)
    if trainer.is_global_zero:
        print(f"sent by a rank: {strategy.door.ledger.sent_bytes / 1e6:.1f} MB in {steps} steps")


if __name__ == "__main__":
    main()
