"""The Trainer of Hugging Face Transformers, and every class derived from it (TRL's): one call before `train`.

    thinwire.init()                                               # before TrainingArguments: the ledger, and chosen collectives
    trainer = Trainer(model=model, args=args, train_dataset=data)
    attach(trainer, compress="int4")                              # or sync="diloco", every=30, compress="int4"
    trainer.train(resume_from_checkpoint=...)

Settings may stand in the arguments instead, where a configuration file and the command line reach them:

    args = TrainingArguments(..., thinwire={"compress": "int4"})  # thinwire.adapters.transformers.TrainingArguments
    python train.py --thinwire '{"compress": "int4"}'             # through HfArgumentParser

Each `checkpoint-N` also gets what every rank owes. With a rare sync, `evaluate`, `predict` and `save_model` see the average, and
all ranks hold it after `train`.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_utils import get_last_checkpoint

from thinwire.adapters.accelerate import attach as attach_accelerator
from thinwire.adapters.front_door import FrontDoor, is_sharded
from thinwire.errors import UserError


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Transformers' own, and `thinwire`: the settings of `FrontDoor`."""

    thinwire: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Settings of thinwire, as JSON: {"compress": "int4"}'}
    )


def attach(trainer: transformers.Trainer, **settings: Any) -> FrontDoor:
    """`trainer.train()` synchronises as `settings` say: those of `FrontDoor`, else `trainer.args.thinwire`. On every rank.

    UserError for settings that do not exist, load_best_model_at_end with a rare sync, and checkpoints of a model in shards.
    """
    given = settings or getattr(trainer.args, "thinwire", None) or {}
    if is_sharded(trainer.model) and trainer.args.save_strategy != "no":
        raise UserError("transformers: the Trainer saves no model that you have cut with fully_shard; set save_strategy='no'")
    door = attach_accelerator(trainer.accelerator, **(json.loads(given) if isinstance(given, str) else given))
    if door.rare:
        if trainer.args.load_best_model_at_end:
            raise UserError("transformers: load_best_model_at_end chooses a replica's model, not the average; leave it out")
        trainer.args.average_tokens_across_devices = False  # else replicas would wait for each other in every step
        for name in ("evaluate", "predict", "save_model"):
            setattr(trainer, name, partial(_averaged, door, getattr(trainer, name)))
    train = trainer.train

    def train_and_go_on(resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        found = get_last_checkpoint(trainer.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        callback = _Callback(door, found or None)
        trainer.add_callback(callback)
        try:
            return train(resume_from_checkpoint, *arguments, **options)
        finally:
            trainer.remove_callback(callback)

    trainer.train = train_and_go_on
    return door


class _Callback(transformers.TrainerCallback):
    """Of one call of `train`."""

    def __init__(self, door: FrontDoor, checkpoint: str | None) -> None:
        self._door, self._checkpoint = door, checkpoint

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self._checkpoint is not None:
            self._door.load(Path(self._checkpoint))

    def on_save(self, args: transformers.TrainingArguments, state: transformers.TrainerState, *_: Any, **__: Any) -> None:
        self._door.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._door.finish()


def _averaged(door: FrontDoor, method: Any, *arguments: Any, **options: Any) -> Any:
    with door.averaged():
        return method(*arguments, **options)
