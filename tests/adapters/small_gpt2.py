"""A GPT-2 of some thousand parameters and text for it; trained on ranks of a pool by each framework's own loop."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import thinwire
from pool import Rank
from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded
from thinwire.sync.buckets import assign_buckets
from thinwire.traffic import Transfer
from thinwire.workload import Parameter

CONTEXT, BATCH = 32, 4
SIZES = {"vocab_size": 128, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
RATE = {"learning_rate": 1e-2}
TEXTS = [Path(__file__)]


def model() -> nn.Module:
    """31,616 parameters, from a seed; with dropout, so that random numbers count."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0, use_cache=False))


def cut(net: Any, **mesh: Any) -> Any:
    """Shared out among the ranks, block by block."""
    for block in net.transformer.h:
        fully_shard(block, **mesh)
    return fully_shard(net, **mesh)


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of TEXTS, this file's own."""

    def __init__(self) -> None:
        text = torch.tensor([byte for path in TEXTS for byte in path.read_bytes() if byte < SIZES["vocab_size"]])
        self.windows = text.unfold(0, CONTEXT, CONTEXT // 2)

    def __len__(self) -> int:
        return len(self.windows) // 16 * 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class Resumable:
    """This rank's batches. Lightning goes on from the right one only where the loader itself knows its place."""

    def __init__(self, context: Rank) -> None:
        self._text, self._context, self._place = Text(), context, 0

    def __len__(self) -> int:
        return len(self._text) // (BATCH * self._context.world_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while self._place < len(self):
            first = (self._place * self._context.world_size + self._context.rank) * BATCH
            self._place += 1
            yield torch.utils.data.default_collate([self._text[index] for index in range(first, first + BATCH)])
        self._place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self._place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._place = state["place"]


@contextlib.contextmanager
def started_by_torchrun(context: Rank) -> Iterator[None]:
    """What frameworks look for in the environment."""
    rank, world_size = str(context.rank), str(context.world_size)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    place |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    os.environ |= place
    try:
        yield
    finally:
        for name in place:
            del os.environ[name]


def with_trainer(
    context: Rank,
    settings: dict[str, Any] | None,
    folder: Path,
    *,
    steps: int,
    resume: str = "",
    shard: bool = False,
    **options: Any,
) -> Any:
    """Transformers' Trainer; its checkpoints lie in `folder`."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer

    from thinwire.adapters.transformers import TrainingArguments, attach

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    with started_by_torchrun(context):
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE["learning_rate"],
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
            thinwire=settings,
            **options,
        )
        trainer = Trainer(model=cut(model()) if shard else model(), args=args, train_dataset=Text())
        door = attach(trainer) if settings is not None else None
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer.model, door


def with_accelerate(
    context: Rank,
    settings: dict[str, Any] | None,
    folder: Path,
    *,
    steps: int,
    resume: str = "",
    save_at: int = 0,
    shard: bool = False,
) -> Any:
    """A loop of one's own; its checkpoint is `folder`."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from thinwire.adapters.accelerate import attach

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    with started_by_torchrun(context):
        accelerator = Accelerator(cpu=True)
        door = attach(accelerator, **settings) if settings is not None else None
        net = cut(model()) if shard else model()
        loader = torch.utils.data.DataLoader(Text(), batch_size=BATCH)  # type: ignore[var-annotated]
        net, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=RATE["learning_rate"]), loader)
        batches = [batch for _ in range(1 + steps // len(loader)) for batch in loader]
        first = 0
        if resume:
            accelerator.load_state(resume)
            first = save_at
        for step in range(first, steps):
            accelerator.backward(net(**batches[step]).loss)
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 == save_at:
                accelerator.save_state(str(folder))
        if door is not None:
            door.finish()
        return accelerator.unwrap_model(net), door


def with_lightning(
    context: Rank,
    settings: dict[str, Any] | None,
    folder: Path,
    *,
    steps: int,
    resume: str = "",
    save_every: int = 0,
    shard: bool = False,
) -> Any:
    """Lightning's Trainer; its checkpoints lie in `folder`. In shards by a strategy of its own, which calls `configure_model`."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    from thinwire.adapters.lightning import ThinwireStrategy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def configure_model(self) -> None:
            if shard and not isinstance(self.net, FSDPModule):
                cut(self.net, mesh=self.device_mesh["data_parallel"])
                thinwire.compress_sharded(self.net, "float32", "float32")

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            return self.net(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=RATE["learning_rate"])

    with started_by_torchrun(context):
        strategy: Any = DDPStrategy() if settings is None else ThinwireStrategy(**settings)
        if shard:
            strategy = ModelParallelStrategy(data_parallel_size=context.world_size, tensor_parallel_size=1)
        callbacks: list[pl.Callback] = []
        if save_every:
            callbacks = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=save_every, save_top_k=-1)]
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=context.world_size,
            strategy=strategy,
            max_steps=steps,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=bool(save_every),
            enable_progress_bar=False,
            use_distributed_sampler=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        module = Module()
        trainer.fit(module, Resumable(context), ckpt_path=resume or None)
        return module.net, getattr(strategy, "door", None)


LOOPS: dict[str, Callable[..., Any]] = {"transformers": with_trainer, "accelerate": with_accelerate, "lightning": with_lightning}


def settings_of(door: str, settings: dict[str, Any]) -> dict[str, Any]:
    """As the framework's own configuration has them."""
    if door != "lightning":
        return settings
    own = {name: value for name, value in settings.items() if name in ("sync", "compress")}
    return own | {"thinwire": {name: value for name, value in settings.items() if name not in own}}


def loss_of(net: nn.Module) -> float:
    """Over the text, of a long one some hundred windows, without dropout."""
    net.eval()
    windows = Text().windows
    windows = windows[:: max(1, len(windows) // 500)]
    with torch.no_grad():
        return float(net(input_ids=windows, labels=windows).loss)


def predicted(net: nn.Module, world_size: int, prefix: str, coding: dict[str, Any], *, tracks_use: bool) -> list[Transfer]:
    """What a step sends, by the exchange itself. prefix: of the names that the framework gives."""
    parameters = [Parameter(prefix + name, tuple(one.shape)) for name, one in net.named_parameters()]
    exchange = make_exchange(Coded(**coding), Ledger())
    exchange._tracks_use = tracks_use  # type: ignore[union-attr] - as compress_gradients attaches it
    return [
        transfer
        for index, bucket in enumerate(assign_buckets(parameters, 0))
        for transfer in exchange.transfers(f"bucket {index}", bucket, "data", world_size)
    ]
