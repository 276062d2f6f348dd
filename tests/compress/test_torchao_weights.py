"""Weights through torchao: what is trained with rounding is what is stored."""

import sys

import pytest
import torch
from torch import nn

from thinwire.compress.weights.torchao_weights import convert, prepare_qat, round_weights, stored_bytes
from thinwire.errors import UserError

WIDTH, HIDDEN = 64, 96


class Net(nn.Module):
    """An embedding, a norm and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(self.embed(tokens)))))


TOKENS = torch.arange(11)
TARGET = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = (model(TOKENS) - TARGET).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float((model(TOKENS) - TARGET).square().mean())


@pytest.mark.parametrize(("bits", "levels"), [(8, 256), (4, 16)])
def test_converting_keeps_the_trained_outputs_to_the_bit(bits: int, levels: int) -> None:
    model = Net()
    plain = model(TOKENS).detach()
    prepare_qat(model, bits)
    assert not torch.equal(model(TOKENS), plain), "the forward pass rounds"
    first = train(model, 0)
    assert train(model, 40) < first / 4
    trained = model(TOKENS).detach()
    convert(model)
    assert torch.equal(model(TOKENS), trained)
    for layer in (model.up, model.down):
        numbers = layer.weight.qdata
        assert numbers.dtype == torch.int8 and int(numbers.max()) - int(numbers.min()) < levels
    assert type(model.embed.weight) is nn.Parameter


def test_four_bits_trained_with_rounding_beat_four_bits_rounded_afterwards() -> None:
    aware, unaware = Net(), Net()
    prepare_qat(aware, 4)
    train(aware, 100)
    convert(aware)
    train(unaware, 100)
    round_weights(unaware, 4)
    assert train(aware, 0) < train(unaware, 0) / 2


def test_int8_bytes_are_counted_and_errors_are_half_a_step() -> None:
    model = Net()
    weight = model.up.weight.detach().clone()
    before = stored_bytes(model)
    round_weights(model, 8)
    matrices, rows = 2 * WIDTH * HIDDEN, WIDTH + HIDDEN
    assert before == 4 * (11 * WIDTH + WIDTH + matrices)
    assert stored_bytes(model) == before - 3 * matrices + 4 * rows
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((model.up.weight.dequantize() - weight).abs() <= 0.51 * step).all())


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="3 bits: torchao's weights have 8 or 4 here"):
        prepare_qat(Net(), 3)
    with pytest.raises(UserError, match="this model was not prepared for rounding"):
        convert(Net())
    with pytest.raises(UserError, match="0 has 40 inputs, and int4 wants a multiple of 32"):
        prepare_qat(nn.Sequential(nn.Linear(40, 8)), 4)
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="torchao is not installed; pip install 'thinwire"):
        round_weights(Net(), 8)
