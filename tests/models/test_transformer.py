import builtins
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.config.model import ModelConfig
from thinwire.models import transformer
from thinwire.models.transformer import Transformer, make_rotation, rotate

SHAPES = [
    {"norm": "layer", "mlp": "gelu"},
    {"norm": "rms", "mlp": "swiglu", "kv_heads": 2, "tied": False},
    {"norm": "layer", "mlp": "gelu", "positions": "learned"},
    {"norm": "rms", "mlp": "swiglu", "kv_heads": 1, "positions": "learned", "tied": False},
    {"experts": 4, "experts_per_token": 2, "capacity": 1.0},
]


def small(**changes: object) -> ModelConfig:
    fields = {"layers": 2, "width": 32, "heads": 4, "vocabulary": 61, "context": 24, **changes}
    return ModelConfig.model_validate(fields)


def tokens(batch: int = 3, length: int = 24, vocabulary: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_become_ready_in_the_reverse_of_registration(shape: dict) -> None:
    model, ready = Transformer(small(**shape)), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: ready.append(name))
    model(tokens(), tokens(seed=2)).backward()
    assert ready == [name for name, _ in model.named_parameters()][::-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_no_token_sees_the_future(shape: dict) -> None:
    model, seen, changed = Transformer(small(**shape)), tokens(), tokens()
    changed[:, 15] = (changed[:, 15] + 1) % 61
    with torch.no_grad():
        before, after = model(seen), model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert (before[:, 15:] - after[:, 15:]).abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_the_cross_entropy_and_starts_at_the_uniform_guess(shape: dict) -> None:
    model, seen, targets = Transformer(small(**shape)), tokens(), tokens(seed=2)
    loss = model(seen, targets)
    torch.testing.assert_close(loss, F.cross_entropy(model(seen).flatten(0, 1), targets.flatten()))
    assert loss.item() == pytest.approx(math.log(61), abs=0.1)
    targets[:, 5:] = -100
    torch.testing.assert_close(model(seen, targets), F.cross_entropy(model(seen)[:, :5].flatten(0, 1), targets[:, :5].flatten()))


def test_attention_is_the_textbook_one_with_shared_keys() -> None:
    config = small(kv_heads=2, positions="learned")
    attention, x = transformer.Attention(config), torch.randn(2, 10, 32)
    q, k, v = attention.qkv(x).split([32, 16, 16], dim=-1)
    q = q.view(2, 10, 4, 8).transpose(1, 2)
    k, v = (t.view(2, 10, 2, 8).transpose(1, 2).repeat_interleave(2, dim=1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf)
    expected = attention.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 10, 32))
    torch.testing.assert_close(attention(x, None), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 12), st.integers(1, 8))
def test_rotated_products_depend_on_the_distance_alone(first: int, second: int, shift: int, half: int) -> None:
    q, k = torch.randn(2, 2 * half, dtype=torch.float64).unbind()
    cos, sin = make_rotation(torch.arange(64), 2 * half, 10_000.0, q)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, cos[position, 0], sin[position, 0])

    torch.testing.assert_close(
        turned(q, first) @ turned(k, second), turned(q, first + shift) @ turned(k, second + shift), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(turned(q, first).norm(), q.norm(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("std", [0.02, 0.06])
def test_weights_start_as_documented(std: float) -> None:
    model = Transformer(small(layers=8, width=128, tied=False, init_std=std))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
            continue
        expected = std / 4 if name.endswith(("attention.out.weight", "mlp.down.weight")) else std
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_a_model_from_the_meta_device_is_complete_after_init() -> None:
    with torch.device("meta"):
        model = Transformer(small())
    model = model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(5))
    twin = Transformer(small())
    twin.init_weights(torch.Generator().manual_seed(5))
    torch.testing.assert_close(model(tokens()), twin(tokens()), rtol=0, atol=0)


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens is longer than the context of 24"):
        Transformer(small())(tokens(length=25))


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_it_learns(shape: dict) -> None:
    torch.manual_seed(0)
    model, seen = Transformer(small(**shape)), tokens(batch=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(seen[:, :-1], seen[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


def test_the_file_stands_alone_and_any_object_with_the_fields_will_do_as_config(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    plain = builtins.__import__

    def noted(name: str, *arguments: Any, **named: Any) -> Any:
        imported.append(name)
        return plain(name, *arguments, **named)

    spec = importlib.util.spec_from_file_location("alone", Path(transformer.__file__))
    assert spec is not None and spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", noted)
        spec.loader.exec_module(alone)
    assert "torch" in imported and not [name for name in imported if name.startswith("thinwire")]
    model = alone.Transformer(SimpleNamespace(**small().model_dump()))
    assert model(tokens()).shape == (3, 24, 61)
