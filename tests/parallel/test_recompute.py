"""Blocks computed again in the backward pass: the same bits, the memory that is predicted, the operations that are counted."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from thinwire.config.model import ModelConfig
from thinwire.models.transformer import Transformer
from thinwire.parallel import recompute
from thinwire.plan.memory import ALLOCATOR, Blocks, activations_bytes
from thinwire.workload import Workload

SHAPES: list[dict[str, Any]] = [
    {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "kv_heads": 2},
    {"norm": "layer", "mlp": "gelu", "positions": "learned"},
    {"norm": "rms", "mlp": "swiglu", "positions": "learned", "dtype": "float64"},
]
MIXES = {"none": (0, 0), "selective": (6, 0), "full": (0, 6), "some of each": (2, 3)}
ROWS, LENGTH = 8, 128


def of_shape(options: dict[str, Any]) -> ModelConfig:
    return ModelConfig(layers=6, width=64, heads=4, vocabulary=64, context=LENGTH, **options)


def kinds_of(selective: int, full: int) -> dict[str, str]:
    """As `plan.memory` places them."""
    names = [f"blocks.{index}" for index in range(6)]
    return dict.fromkeys(names[:full], "full") | dict.fromkeys(names[full : full + selective], "selective")


class Allocated(TorchDispatchMode):
    """The most bytes at once of tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and (place := one.untyped_storage()._cdata) not in self.sizes:
                self.sizes[place] = one.untyped_storage().nbytes()
                weakref.finalize(one.untyped_storage(), self.sizes.pop, place)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def trained(shape: ModelConfig, mix: str) -> tuple[torch.Tensor, list[torch.Tensor], int, int]:
    """Loss, gradients, the most bytes at once, and operations, of a forward and a backward pass."""
    torch.manual_seed(0)
    model = Transformer(shape).to(getattr(torch, shape.dtype))
    recompute.apply(model, kinds_of(*MIXES[mix]))
    tokens = torch.randint(shape.vocabulary, (ROWS, LENGTH + 1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Allocated() as allocated:
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    with FlopCounterMode(display=False) as counted:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    return loss.detach(), gradients, allocated.peak, counted.get_total_flops()


@pytest.mark.long
@pytest.mark.parametrize("options", SHAPES, ids=lambda options: " ".join(map(str, options.values())))
def test_it_saves_what_is_predicted_repeats_what_is_counted_and_changes_no_bit(options: dict[str, Any]) -> None:
    """What attention itself repeats is not counted on this device; it is 4 width * sequence a token and block."""
    shape = of_shape(options)
    workload = Workload.of_transformer(shape, ROWS, LENGTH)
    loss, gradients, peak, flops = trained(shape, "none")
    predicted = activations_bytes(shape, workload, casts=False)
    for mix, (selective, full) in MIXES.items():
        if mix == "none":
            continue
        its_loss, its_gradients, its_peak, its_flops = trained(shape, mix)
        assert torch.equal(its_loss, loss) and all(map(torch.equal, its_gradients, gradients))
        blocks = Blocks(plain=6 - selective - full, selective=selective, full=full)
        saved = predicted - activations_bytes(shape, workload, casts=False, blocks=blocks)
        assert saved == pytest.approx(ALLOCATOR * (peak - its_peak), rel=0.05), mix
        again = workload.recomputing(kinds_of(selective, full)).recomputed_flops_per_token
        attention = 4 * shape.width * LENGTH * (selective + full)
        assert its_flops - flops == workload.tokens_per_microbatch * (again - attention), mix


def test_what_is_left_to_compute_when_a_gradient_is_ready() -> None:
    """Blocks are computed again in the reverse order: a full one at once, attention and MLP of a selective one apart."""
    shape = of_shape(SHAPES[0])
    plain = Workload.of_transformer(shape, ROWS, LENGTH)
    mixed = plain.recomputing(kinds_of(1, 1))
    qkv, out, up = (
        2.0 * plain.parameter(f"blocks.0.{name}.weight").numel for name in ("attention.qkv", "attention.out", "mlp.up")
    )
    attention = qkv + 4.0 * shape.width * LENGTH
    expected = {
        "embed.weight": 0.0,
        "blocks.0.mlp.down.weight": 0.0,
        "blocks.1.attention.out.weight": attention + out + up,
        "blocks.1.mlp.up.weight": attention + out + up + attention,
        "blocks.2.attention.qkv.weight": 2 * (attention + up) + out,
        "norm.weight": 2 * (attention + up) + out,
    }
    for name, again in expected.items():
        assert mixed.backward_flops_remaining(name) == pytest.approx(plain.backward_flops_remaining(name) + again)
    assert mixed.flops_per_token == pytest.approx(plain.flops_per_token + 2 * (attention + up) + out)
    assert mixed.chain_recomputed_per_token == pytest.approx((0, attention + out + up, attention + up, 0, 0, 0, 0, 0))
    assert mixed.chain_flops_per_token == plain.chain_flops_per_token
