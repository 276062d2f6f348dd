"""Generation with kept keys and values: the tokens of the plain model, in every layout; draws follow the probabilities."""

from collections import Counter

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank
from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.models.transformer import Transformer, causal_attention
from thinwire.parallel.generate import LABEL, Axes, Generator, Sampling, _KeepingAttention

pytestmark = pytest.mark.heavy

SHAPES = {
    "rotary": ModelConfig(layers=3, width=32, heads=4, kv_heads=2, hidden=48, vocabulary=37, context=40, init_std=0.3),
    "uneven": ModelConfig(layers=2, width=36, heads=9, kv_heads=3, hidden=41, vocabulary=37, context=40, init_std=0.3),
    "learned": ModelConfig(
        layers=2,
        width=32,
        heads=4,
        hidden=48,
        vocabulary=37,
        context=40,
        init_std=0.3,
        positions="learned",
        norm="layer",
        mlp="gelu",
        tied=False,
    ),
}
PROMPT, MOST = [3, 1, 4, 1, 5], 30
DRAWN = Sampling(temperature=1.3, top_k=20, seed=7)


def new_model(shape: str) -> Transformer:
    torch.manual_seed(2)
    return Transformer(SHAPES[shape]).eval()


@torch.no_grad()
def plain(model: Transformer, prompt: list[int], most: int) -> list[int]:
    """Greedy, the whole text through the model for each token."""
    text = list(prompt)
    for _ in range(most):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_the_plain_model(shape: str) -> None:
    expected = plain(new_model(shape), PROMPT, MOST)
    assert len(set(expected)) > 3
    assert list(Generator(new_model(shape), Sampling()).tokens(PROMPT, MOST)) == expected


def test_several_tokens_at_once_attend_to_those_before_them() -> None:
    q, k, v = (torch.randn(2, heads, 15, 8) for heads in (6, 2, 2))
    keeping = _KeepingAttention()
    parts = [keeping(*(one[:, :, begin:end] for one in (q, k, v))) for begin, end in ((0, 6), (6, 13), (13, 14), (14, 15))]
    torch.testing.assert_close(torch.cat(parts, dim=2), causal_attention(q, k, v))


def test_it_stops_before_the_end_token() -> None:
    expected = plain(new_model("rotary"), PROMPT, MOST)
    end = expected[10]
    assert list(Generator(new_model("rotary"), Sampling()).tokens(PROMPT, MOST, end)) == expected[: expected.index(end)]


def test_draws_follow_the_probabilities() -> None:
    logits_V, temperature, draws = torch.randn(37), 1.5, 6000
    p_V = (logits_V.double() / temperature).softmax(0)
    generator = Generator(new_model("rotary"), Sampling(temperature=temperature, seed=5))
    found = Counter(generator._choose(logits_V) for _ in range(draws))
    for word, p in enumerate(p_V.tolist()):
        assert abs(found[word] / draws - p) < 4.5 * (p * (1 - p) / draws) ** 0.5 + 1e-3
    few = Generator(new_model("rotary"), Sampling(temperature=9.0, top_k=3))
    assert {few._choose(logits_V) for _ in range(60)} == set(p_V.topk(3).indices.tolist())


def on_axes(context: Rank, shape: str, pipe: int, tensor: int, sampling: Sampling) -> list[int]:
    mesh = init_device_mesh("cpu", (pipe, tensor), mesh_dim_names=("pipe", "tensor"))
    axes = Axes(
        ledger=context.ledger,
        pipe=mesh.get_group("pipe") if pipe > 1 else None,
        tensor=mesh.get_group("tensor") if tensor > 1 else None,
    )
    found = list(Generator(new_model(shape), sampling, axes).tokens(PROMPT, MOST))
    assert any(call.label == LABEL for call in context.recorded())
    return found


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    ("shape", "pipe", "tensor"),
    [("rotary", 2, 1), ("rotary", 1, 2), ("learned", 2, 1), ("learned", 1, 2), ("rotary", 2, 2), ("uneven", 1, 2)],
)
def test_every_layout_gives_the_same_tokens(
    request: pytest.FixtureRequest, shape: str, pipe: int, tensor: int, sampling: Sampling
) -> None:
    pool: Pool = request.getfixturevalue(f"ranks{pipe * tensor}")
    expected = list(Generator(new_model(shape), sampling).tokens(PROMPT, MOST))
    assert pool.run(on_axes, shape, pipe, tensor, sampling) == [expected] * (pipe * tensor)


def test_what_cannot_be_is_refused() -> None:
    generator = Generator(new_model("rotary"), Sampling())
    with pytest.raises(UserError, match="the prompt is empty"):
        next(generator.tokens([], 3))
    with pytest.raises(UserError, match=r"5 tokens and 36 more are above the model's context of 40; ask for 35"):
        next(generator.tokens(PROMPT, 36))
