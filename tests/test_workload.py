import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from thinwire.config.model import PRESETS, ModelConfig, preset
from thinwire.errors import UserError
from thinwire.models.transformer import Transformer
from thinwire.workload import Workload

SHAPES = [
    {"norm": "layer", "mlp": "gelu"},
    {"norm": "layer", "mlp": "gelu", "positions": "learned", "tied": False},
    {"norm": "layer", "mlp": "swiglu", "kv_heads": 2},
    {"norm": "layer", "mlp": "swiglu", "experts": 4, "experts_per_token": 2, "capacity": 1.25},
]
BATCH, SEQUENCE = 3, 32


def small(**changes: object) -> ModelConfig:
    fields = {"layers": 3, "width": 64, "heads": 4, "vocabulary": 96, "context": 48, **changes}
    return ModelConfig.model_validate(fields)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(96, (2, BATCH, SEQUENCE), generator=generator)
    return inputs, targets


def listed(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_equal_the_real_model(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = Transformer(config)
    workload = Workload.of_transformer(config, 1, 8)
    assert [(p.name, p.shape) for p in workload.parameters] == listed(model)
    assert workload.num_parameters == sum(p.numel() for p in model.parameters())
    assert workload.stored_bytes == 4 * workload.num_parameters
    assert [f"blocks.{name}" for name, _ in model.blocks.named_children()] == list(workload.block_names)


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 3), heads=st.sampled_from([2, 4]), grouped=st.booleans(), head=st.sampled_from([4, 6]),
    positions=st.sampled_from(["rotary", "learned"]), mlp=st.sampled_from(["gelu", "swiglu"]), tied=st.booleans(),
    norm=st.sampled_from(["layer", "rms"]), vocabulary=st.integers(2, 40), experts=st.sampled_from([0, 3]),
)  # fmt: skip
def test_parameters_of_any_shape(layers: int, heads: int, grouped: bool, head: int, **rest: object) -> None:
    config = small(layers=layers, width=heads * head, heads=heads, kv_heads=heads // 2 if grouped else heads, **rest)
    with torch.device("meta"):
        model = Transformer(config)
    assert [(p.name, p.shape) for p in Workload.of_transformer(config, 1, 4).parameters] == listed(model)


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_equal_the_counter(shape: dict) -> None:
    config = small(**shape)
    model, (inputs, targets) = Transformer(config), batch()
    workload = Workload.of_transformer(config, BATCH, SEQUENCE)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(inputs, targets)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    tokens = workload.tokens_per_microbatch
    assert forward.get_total_flops() == workload.forward_flops_per_token * tokens
    assert backward.get_total_flops() == workload.backward_flops_per_token * tokens


def test_flops_are_the_documented_form() -> None:
    config = preset("124m")
    workload = Workload.of_transformer(config, 2, 512)
    in_products = workload.num_parameters - 1024 * 768 - 25 * 768
    assert workload.flops_per_token == 6 * in_products + 12 * 12 * 768 * 512
    assert workload.flops_per_microbatch == workload.flops_per_token * 1024


@pytest.mark.parametrize("shape", SHAPES)
def test_what_remains_of_backward_when_each_gradient_is_ready(shape: dict) -> None:
    """Counts the operations that really run before each gradient's hook; what is missing from the total remains."""
    config = small(**shape)
    model, (inputs, targets), remaining = Transformer(config), batch(), {}
    workload = Workload.of_transformer(config, BATCH, SEQUENCE)
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(inputs, targets)
        with FlopCounterMode(display=False) as counter:
            for name, parameter in model.named_parameters():
                parameter.register_post_accumulate_grad_hook(
                    lambda _, name=name: remaining.__setitem__(name, counter.get_total_flops())
                )
            loss.backward()
    total, tokens = counter.get_total_flops(), workload.tokens_per_microbatch
    for name, done in remaining.items():
        ours = workload.backward_flops_remaining(name) * tokens
        # A weight's gradient may be ready before the same product's gradient for its input is computed.
        slack = math.prod(workload.parameter(name).shape) * 2 * tokens
        assert 0 <= (total - done) - ours <= slack + 4 * config.width * SEQUENCE * tokens, name
    assert workload.backward_flops_remaining("embed.weight") == 0


def test_optimizer_bytes_are_the_real_state() -> None:
    config = small()
    model, (inputs, targets) = Transformer(config), batch()
    workload = Workload.of_transformer(config, BATCH, SEQUENCE)
    for name, optimizer in {
        "adamw": torch.optim.AdamW(model.parameters()),
        "sgd": torch.optim.SGD(model.parameters(), momentum=0.9),
    }.items():
        model(inputs, targets).backward()
        optimizer.step()
        state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
        assert sum(v.numel() * 4 for v in state) == workload.optimizer_bytes(name)


def test_any_model_from_its_list_of_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 5))
    workload = Workload.of_parameters(listed(model), tokens_per_microbatch=7)
    assert workload.num_parameters == 325 and workload.flops_per_token == 6 * 325
    assert workload.backward_flops_remaining("0.weight") == 0
    assert workload.backward_flops_remaining("1.weight") == pytest.approx(4 * 220)
    given = Workload.of_parameters(listed(model), 7, flops_per_token=900.0)
    assert (given.forward_flops_per_token, given.backward_flops_per_token) == (300, 600)
    assert given.backward_flops_remaining("1.weight") == pytest.approx(600 * 220 / 325)


def test_what_cannot_be_known_is_said() -> None:
    workload = Workload.of_parameters([("w", (2, 2))], 1)
    with pytest.raises(UserError, match="no parameter 'v'"):
        workload.backward_flops_remaining("v")
    with pytest.raises(UserError, match="49 tokens is longer than the model's context of 48"):
        Workload.of_transformer(small(), 1, 49)
    with pytest.raises(UserError, match="empty"):
        Workload.of_parameters([], 1)
