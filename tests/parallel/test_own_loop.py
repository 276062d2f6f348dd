"""A user's own loop: `thinwire.apply` gives what one rank gives, in every layout and for any model, and sends what it says."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from sent import priced, sent_over
from torch import Tensor, nn

import thinwire
from pool import Pool, Rank
from thinwire.collectives.ledger import difference
from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.layout import AXES
from thinwire.models.transformer import Transformer, cross_entropy
from thinwire.traffic import merged

LENGTH, ROWS, STEPS, MICRO, WORDS, CLIP = 8, 2, 3, 2, 37, 0.3
TINY = {"layers": 2, "width": 16, "heads": 2, "hidden": 24, "vocabulary": WORDS, "context": 16, "dtype": "float64"}
HUGGING_FACE = ("llama", "tied", "qwen3", "gpt2", "odd")
EXPERTS = {"experts": 4, "experts_per_token": 2, "capacity": 0.0}
ALTERNATING = """
name = "alternating"
ranks = ["host0/cpu0", "host1/cpu0", "host0/cpu1", "host1/cpu1"]

[[host]]
name = "host{i}"
count = 2
device = { kind = "cpu", name = "cpu{j}", count = 2 }
card = { bandwidth_bps = "100 Mbit/s", latency_s = "50 us" }
"""
"""Two hosts of two ranks, numbered in turns."""


class Blocks(nn.Module):
    """A model that nobody here knows: two lists of modules, of which one is longer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12)
        self.ends = nn.ModuleList([nn.Linear(12, WORDS)])
        self.middle = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for one in self.middle:
            x = x + one(x)
        logits: Tensor = self.ends[0](x)
        return logits


def new_model(name: str) -> nn.Module:
    torch.manual_seed(5)
    match name:
        case "blocks":
            return Blocks().double()
        case "chain":
            middle = [nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)]
            return nn.Sequential(nn.Embedding(WORDS, 12), *middle, nn.Linear(12, WORDS)).double()
    if name in HUGGING_FACE:
        return hugging_face(name)
    return Transformer(ModelConfig.model_validate(TINY | (EXPERTS if name == "experts" else {}))).double()


def hugging_face(name: str) -> nn.Module:
    """Tiny ones with random weights. Their modules take long to load."""
    import transformers

    sizes = {"vocab_size": WORDS, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
    llama = {**sizes, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 32}
    match name:
        case "llama":
            config = transformers.LlamaConfig(**llama, pad_token_id=3, attention_bias=True, mlp_bias=True)
        case "tied":
            config = transformers.Qwen2Config(**llama, tie_word_embeddings=True)
        case "odd":
            config = transformers.LlamaConfig(**{**llama, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24})
        case "qwen3":
            config = transformers.Qwen3Config(**llama, head_dim=8)
        case _:
            dropped = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}
            config = transformers.GPT2Config(**sizes, n_positions=32, **dropped)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).double()
    return model


def loss_of(name: str) -> Any:
    if name in ("transformer", "experts", *HUGGING_FACE):
        return None
    return lambda logits, targets: nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def micro(step: int, index: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, WORDS, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(100 * step + index))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def on_one_rank(name: str, replicas: int) -> list[float]:
    model, loss, losses = new_model(name), loss_of(name), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = [micro(step, index) for index in range(MICRO * replicas)]
        if name in HUGGING_FACE:
            found = [cross_entropy(model(x).logits, y) / len(batches) for x, y in batches]
        else:
            found = [(model(x, y) if loss is None else loss(model(x), y)) / len(batches) for x, y in batches]
        torch.stack(found).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(float(torch.stack(found).sum().detach()))
    return losses


def in_own_loop(rank: Rank, name: str, layout: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    if "cluster" in options:
        file = Path(tempfile.gettempdir()) / f"alternating-{os.getpid()}.toml"
        file.write_text(options["cluster"], encoding="utf-8")
        options = options | {"cluster": str(file)}
    options = {"loss": loss_of(name), "micro_batches": MICRO, "clip": CLIP} | options
    shared = thinwire.apply(new_model(name), layout, micro(0, 0), **options)
    optimizer = torch.optim.AdamW(shared.module.parameters(), lr=1e-2)
    losses = []
    with shared.training(optimizer):
        for step in range(STEPS):
            before = shared.ledger.snapshot()
            loss = shared.step([micro(step, MICRO * shared.replica + index) for index in range(MICRO)])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(shared.mean(loss))
        sent, said = difference(shared.ledger.snapshot(), before), shared.traffic()
    shared.close()
    groups, axes = {axis: shared.groups[axis] for axis in AXES}, {}
    for axis, group in groups.items():
        its = {call: total for call, total in sent_over(axis, sent).items() if call[1] != "recv" and group.size() > 1}
        axes[axis] = its, priced(merged(one for one in said if one.axis == axis), group)
    return {"losses": losses, "axes": axes, "replica": shared.replica, "order": shared.order, "has_loss": shared.has_loss}


CASES: list[Any] = [
    ("ranks4", "transformer", {"tensor": 2}, {"compress": "int8", "tensor": {"sums": "bf16"}}),
    ("ranks2", "blocks", {}, {"units": []}),
    ("ranks4", "blocks", {"shard": 2, "data": 2}, {}),
    ("ranks2", "chain", {"pipe": 2}, {}),
    ("ranks4", "chain", {"pipe": 2, "data": 2}, {}),
    ("ranks4", "chain", {"pipe": 2, "shard": 2}, {"pipeline": {"schedule": "gpipe"}}),
    ("ranks4", "transformer", {"pipe": 2, "tensor": 2}, {"recompute": "full"}),
    ("ranks4", "transformer", {"tensor": 2, "seq": 2}, {}),
    ("ranks4", "transformer", {"pipe": 4}, {"cluster": ALTERNATING}),
    ("ranks4", "transformer", {"pipe": 2, "data": 2}, {"pipeline": {"schedule": "zb1p"}}),
    ("ranks2", "experts", {"expert": 2}, {}),
    ("ranks2", "blocks", {"shard": 2}, {"recompute": "full"}),
]
PLANNED = [
    ("ranks2", "llama", {"tensor": 2}, {}),
    ("ranks2", "llama", {"pipe": 2}, {}),
    ("ranks2", "qwen3", {"tensor": 2}, {"loss": cross_entropy, "recompute": "full"}),
    ("ranks4", "qwen3", {"tensor": 2, "data": 2}, {}),
    ("ranks4", "tied", {"pipe": 2, "tensor": 2}, {"recompute": "full"}),
    ("ranks4", "tied", {"pipe": 2, "data": 2}, {"pipeline": {"schedule": "zb1p"}}),
    ("ranks4", "tied", {"shard": 2, "data": 2}, {"recompute": "full"}),
    ("ranks2", "gpt2", {"shard": 2}, {}),
    ("ranks2", "gpt2", {}, {}),
]


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("pool", "name", "layout", "options"), PLANNED, ids=lambda value: re.sub(r" at 0x\w+", "", str(value)))
def test_models_of_transformers_equal_one_rank_and_their_prediction(
    request: pytest.FixtureRequest, pool: str, name: str, layout: dict[str, int], options: dict[str, Any]
) -> None:
    check(request.getfixturevalue(pool).run(in_own_loop, name, layout, options, timeout_s=240.0), name, options)


@pytest.mark.heavy
@pytest.mark.parametrize(("pool", "name", "layout", "options"), CASES, ids=lambda value: str(value)[:60].split("\n")[0])
def test_a_loop_of_ones_own_equals_one_rank_and_its_prediction(
    request: pytest.FixtureRequest, pool: str, name: str, layout: dict[str, int], options: dict[str, Any]
) -> None:
    check(request.getfixturevalue(pool).run(in_own_loop, name, layout, options), name, options)


def check(found: list[dict[str, Any]], name: str, options: dict[str, Any]) -> None:
    """Losses of one rank on the same tokens, and the bytes that were said."""
    replicas = 1 + max(one["replica"] for one in found)
    coded = {"compress", "tensor"} & set(options)
    for one in found:
        assert one["losses"] == pytest.approx(on_one_rank(name, replicas), rel=2e-2 if coded else 1e-9)
        for axis, (sent, said) in one["axes"].items():
            assert sent == said, axis
    assert any(one["has_loss"] for one in found)
    assert {one["order"] for one in found} == {(0, 2, 1, 3) if "cluster" in options else tuple(range(len(found)))}


def refused(rank: Rank, name: str, layout: dict[str, int], options: dict[str, Any]) -> str:
    try:
        thinwire.apply(new_model(name), layout, micro(0, 0), **options)
    except UserError as error:
        return str(error)
    return ""


REFUSED = [
    ("blocks", {}, {}, "a Blocks has no loss of its own"),
    ("blocks", {"tensor": 2}, {"loss": cross_entropy}, "layout.tensor: a Blocks is not taken: it has no plan for it"),
    ("blocks", {"pipe": 2}, {"loss": cross_entropy}, "a Blocks cannot be cut into stages"),
    ("blocks", {"seq": 2}, {"loss": cross_entropy}, "a Blocks cannot share out sequences"),
    ("transformer", {"pipe": 2}, {"pipeline": {"schedule": "none"}}, "apply: pipeline.schedule"),
    ("transformer", {"pipe": 2}, {"colour": 1}, "there is no option 'colour'"),
    ("transformer", {}, {"sync": {"accumulate": 2}}, "say micro_batches="),
    ("transformer", {"tensor": 3}, {}, "layout.tensor = 3"),
]


@pytest.mark.heavy
def test_what_does_not_go_is_refused_in_one_line(ranks2: Pool) -> None:
    for name, layout, options, line in REFUSED:
        for found in ranks2.run(refused, name, layout, options):
            assert line in found and "\n" not in found, found


PLANS_REFUSED = [
    ("gpt2", {"tensor": 2}, "layout.tensor: a GPT2LMHeadModel is not taken: it has no plan for it"),
    ("gpt2", {"pipe": 2}, "layout.pipe: a GPT2LMHeadModel is not taken: its plan for pipelines names nothing"),
    ("odd", {"tensor": 2}, "num_key_value_heads = 3; the nearest degree that divides all is 1"),
]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_plans_that_cannot_be_followed_are_refused_in_one_line(ranks2: Pool) -> None:
    for name, layout, line in PLANS_REFUSED:
        for found in ranks2.run(refused, name, layout, {}, timeout_s=240.0):
            assert line in found and "\n" not in found, found
