"""Hugging Face Accelerate: one call before `prepare`, and the script stays as it is.

    thinwire.init()                                               # before Accelerator(): the ledger, and chosen collectives
    accelerator = Accelerator(cpu=True)
    door = attach(accelerator, compress="int4")                   # or sync="diloco", every=30, compress="int4"
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ...
    door.finish()                                                 # with a rare sync: all ranks hold the same model now

`accelerator.save_state` and `load_state` write and read what each rank owes too.
"""

from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from thinwire.adapters.front_door import FrontDoor, is_sharded
from thinwire.errors import UserError


def attach(accelerator: Accelerator, **settings: Any) -> FrontDoor:
    """What `prepare` makes from now on is synchronised as `settings` say: those of `FrontDoor`. On every rank, before `prepare`.

    UserError for settings that do not exist, and later from `prepare` for several models, or optimizers with a rare sync.
    """
    door = FrontDoor("accelerate", **settings)
    prepare, load_state, prepare_model = accelerator.prepare, accelerator.load_state, accelerator.prepare_model
    if door.rare and accelerator.scaler is not None:
        raise UserError("accelerate: a GradScaler may skip a step on one replica while the others wait; take bf16, not fp16")

    def prepare_as_it_is(model: torch.nn.Module, *options: Any, evaluation_mode: bool = False, **more: Any) -> Any:
        evaluation_mode |= door.rare or is_sharded(model)  # moved and cast, not wrapped in DistributedDataParallel
        return prepare_model(model, *options, evaluation_mode=evaluation_mode, **more)

    @wraps(prepare)
    def prepare_and_attach(*objects: Any, **options: Any) -> Any:
        done = prepare(*objects, **options)
        prepared = done if isinstance(done, tuple) else (done,)
        models = [one for one in prepared if isinstance(one, torch.nn.Module)]
        optimizers = [getattr(one, "optimizer", one) for one in prepared if isinstance(one, torch.optim.Optimizer)]
        if len(models) > 1 or (models and door.rare and len(optimizers) != 1):
            raise UserError(
                f"accelerate: prepare() was given {len(models)} models and {len(optimizers)} optimizers; hand over one of each"
            )
        if models and (optimizers or not door.rare):
            door.attach(models[0], optimizers[0] if optimizers else None)
        return done

    @wraps(load_state)
    def load_state_and_owed(*arguments: Any, **options: Any) -> None:
        load_state(*arguments, **options)
        door.load(Path(loaded[-1]))

    def save_owed(models: list[torch.nn.Module], _: list[Any], folder: str) -> None:
        if any(map(is_sharded, models)) and not accelerator.is_fsdp2:
            wanted = "save its shards, its optimizer and door.work.state_dict() with torch.save, on each rank"
            raise UserError(f"accelerate: save_state keeps no model that you have cut with fully_shard; {wanted}")
        door.save(Path(folder))

    loaded: list[str] = []
    accelerator.register_save_state_pre_hook(save_owed)
    accelerator.register_load_state_pre_hook(lambda models, folder: loaded.append(folder))
    accelerator.prepare, accelerator.prepare_model = prepare_and_attach, prepare_as_it_is
    accelerator.load_state = load_state_and_owed
    return door
