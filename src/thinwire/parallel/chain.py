"""A model as a chain: units that run one after the other, each on what the one before gives. Between units it may be cut.

The model knows nothing of it. A stage is some consecutive units; its parameters keep the names that they have in the model, so
that a stage's state is a part of the model's, and stages of any cut can be put together again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.models import transformer
from thinwire.models.transformer import Transformer

Shared = dict[str, Any]
"""What units of one pass make once for all of them; "position_L" is given to them, if positions are others than 0, 1, .., and
in a stage "scale" (`Stage`)."""


@dataclass(frozen=True)
class Unit:
    """What is not cut. modules: names of those it uses, in the model; run(owner, x, shared) gives what the next unit gets."""

    modules: tuple[str, ...]
    run: Callable[[nn.Module, Tensor, Shared], Tensor]


Chain = tuple[Unit, ...]


def chain_of(model: nn.Module) -> Chain:
    """Of a `Transformer`, an `nn.Sequential`, or a model of Hugging Face's with a plan. UserError for another model, of which no
    order of units is known."""
    if isinstance(model, Transformer):
        return transformer_chain(model.config)
    if isinstance(model, nn.Sequential):
        return tuple(Unit((name,), partial(_call, name)) for name, _ in model.named_children())
    from thinwire.parallel.plans import has_plans, planned_chain  # which knows chains

    if has_plans(model):
        return planned_chain(model)
    raise UserError(
        f"a {type(model).__name__} cannot be cut into stages: pipelines take thinwire's Transformer, nn.Sequential and models of "
        "transformers with a plan; write it as an nn.Sequential, or train it without layout.pipe"
    )


class Owner(nn.Module):
    """Some of a model's modules, under the names and in the order that they have there. They are the model's own, not copies."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        places = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
        for name in sorted(set(names), key=places.__getitem__):
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(last, model.get_submodule(name))


class Stage(Owner):
    """Consecutive units of a model: forward(x) gives what the first unit behind them gets, or the model's output."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], scale: Callable[[], float]) -> None:
        """scale: of the loss in a backward pass, for what units add to it."""
        super().__init__(model, (name for unit in units for name in unit.modules))
        self.units, self.scale = tuple(units), scale

    def forward(self, x: Tensor) -> Tensor:
        shared: Shared = {"scale": self.scale}
        for unit in self.units:
            x = unit.run(self, x, shared)
        return x


def boundaries(model: nn.Module, chain: Chain, example: Tensor) -> list[Tensor]:
    """What crosses behind each unit, as tensors on `meta`, for an input like `example`. Nothing is computed."""
    found: list[Tensor] = []
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shared: Shared = {}
        x: Tensor = mode.from_tensor(example)
        for unit in chain:
            x = unit.run(model, x, shared)
            found.append(torch.empty(tuple(x.shape), dtype=x.dtype, device="meta"))
    return found


class _Carried(torch.autograd.Function):
    """x as it is; backward, `extra` gets the gradient that it has as a part of the loss, weight scale()."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, extra: Tensor, weight: float, scale: Callable[[], float]) -> Tensor:
        ctx.extra, ctx.weight, ctx.scale = extra.detach(), weight, scale
        return x.clone()  # no view: what leaves a stage is detached in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], torch.full_like(ctx.extra, ctx.weight * ctx.scale()), None, None


def _call(name: str, owner: nn.Module, x: Tensor, shared: Shared) -> Tensor:
    output: Tensor = owner.get_submodule(name)(x)
    return output


def transformer_chain(config: ModelConfig) -> Chain:
    """Embeddings; each block; the last norm with the head. A tied head uses the embedding at both ends."""
    has_positions, head = config.positions == "learned", "embed" if config.tied else "head"

    def enter(owner: Any, tokens_BL: Tensor, shared: Shared) -> Tensor:
        positions = owner.positions if has_positions else None
        return transformer.embed(tokens_BL, owner.embed, positions, config, shared.get("position_L"))

    def block(name: str, owner: Any, x_BLM: Tensor, shared: Shared) -> Tensor:
        if "rotation" not in shared:
            shared["rotation"] = transformer.rotation_of(x_BLM, config, shared.get("position_L"))
        output: Tensor = owner.get_submodule(name)(x_BLM, shared["rotation"])
        if config.experts and torch.is_grad_enabled():
            weight, scale = config.balance / config.layers, shared.get("scale")
            balance = owner.get_submodule(name).mlp.taken_balance()
            output = _Carried.apply(output, balance, weight, scale)
        return output

    def leave(owner: Any, x_BLM: Tensor, shared: Shared) -> Tensor:
        return transformer.project(x_BLM, owner.norm, owner.get_submodule(head))

    return (
        Unit(("embed", "positions") if has_positions else ("embed",), enter),
        *(Unit((f"blocks.{index}",), partial(block, f"blocks.{index}")) for index in range(config.layers)),
        Unit(("norm", head), leave),
    )
