"""Ranks that share experts give what one rank with all of them gives, alone and with replicas, and send what they say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sent import priced, sent_over
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank
from thinwire.bench.peers import rank as bench
from thinwire.bench.peers.layout_equality import learn, one_rank
from thinwire.collectives.ledger import difference
from thinwire.compress.activations.swap import swapped
from thinwire.compress.base import make_codec
from thinwire.config.compress import read_coding
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.models.transformer import Transformer
from thinwire.parallel import experts
from thinwire.parallel.tensor import Passes
from thinwire.workload import Workload, is_of_expert

pytestmark = pytest.mark.heavy

LENGTH, ROWS, VOCABULARY = 16, 2, 51


def shape(**changes: object) -> ModelConfig:
    fields = {"layers": 2, "width": 32, "heads": 4, "hidden": 24, "vocabulary": VOCABULARY, "context": 16, "experts": 4}
    return ModelConfig.model_validate({**fields, "dtype": "float64", **changes})


def new_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(3)
    return Transformer(config).to(getattr(torch, config.dtype))


def micro(index: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(index))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def new_group(rank: Rank) -> dist.ProcessGroup:
    return init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("expert",)).get_group()


# -- training ---------------------------------------------------------------------------------------------------------


def learned(rank: Rank, config: RunConfig, layout: Layout, folder: Path) -> list[float]:
    losses: list[float] = learn(config, layout, bench.Rank({}, folder, ledger=rank.ledger))
    return losses


def run_of(folder: Path, accumulate: int, **model: Any) -> RunConfig:
    """Clipped, so that the norm of all experts' gradients counts too."""
    text = folder / "text.txt"
    text.write_text("thin wires carry few bytes, and thick books many words; " * 200, encoding="utf-8")
    of_model = {"layers": 2, "width": 16, "heads": 2, "context": 16, "dtype": "float64", "init_std": 0.1, "experts": 4} | model
    train = {"steps": 20, "micro_batch": 1, "sequence": LENGTH, "learning_rate": 1e-2, "warmup_steps": 2, "eval_tokens": 256}
    data = {"source": str(text), "cache": str(folder / "cache")}
    return RunConfig.model_validate(
        {"model": of_model, "data": data, "train": train | {"clip": 0.3}, "sync": {"accumulate": accumulate}}
    )


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (Layout(expert=2), {}),
        (Layout(data=2, expert=2), {"capacity": 0.0, "balance": 0.1}),
        (Layout(expert=4), {"experts_per_token": 1, "capacity": 0.5}),
        pytest.param(Layout(data=2), {"capacity": 0.5}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_training_equals_one_rank(request: pytest.FixtureRequest, tmp_path: Path, layout: Layout, model: dict[str, Any]) -> None:
    """With choices that find no slot, and with none such."""
    pool: Pool = request.getfixturevalue(f"ranks{layout.world_size}")
    alone = one_rank(run_of(tmp_path, 4, **model), tmp_path)
    for losses in pool.run(learned, run_of(tmp_path, 4 // layout.replicas, **model), layout, tmp_path):
        assert losses == pytest.approx(alone, rel=1e-9)


# -- what is sent -----------------------------------------------------------------------------------------------------


def ledger_and_prediction(rank: Rank, config: ModelConfig, coding: str, casts: bool) -> list[tuple[dict, dict, list[float]]]:
    """Of a training pass of two micro-batches and of one evaluation; and losses."""
    group, codec = new_group(rank), make_codec(read_coding(coding, "codec"))
    model, found = new_model(config), []
    experts.apply(model, group, rank.ledger, codec)
    passes = Passes(micro_batch=ROWS, sequence=LENGTH, num_micro=2, casts=casts)
    for trains, predicted in ((True, passes), (False, replace(passes, num_micro=1, evaluates=True))):
        before, losses = rank.ledger.snapshot(), []
        for index in range(predicted.num_micro):
            with torch.autocast("cpu", torch.bfloat16, enabled=casts), torch.set_grad_enabled(trains):
                loss = model(*micro(2 * rank.rank + index))
            losses.append(loss.item())
            if trains:
                loss.backward()
        sent = sent_over("expert", difference(rank.ledger.snapshot(), before))
        transfers = experts.traffic(config, group.size(), predicted, codec)
        assert all(one.in_passes for one in transfers)
        found.append((sent, priced(transfers, group), losses))
    return found


@pytest.mark.parametrize(
    ("ranks", "config", "coding", "casts", "within"),
    [
        ("ranks2", shape(), "none", False, 1e-12),
        ("ranks2", shape(dtype="float32"), "none", True, 1e-2),
        ("ranks2", shape(dtype="float32", capacity=0.0), "int8", False, 1e-3),
        ("ranks4", shape(experts=8, dtype="bfloat16"), "int4", False, 2e-2),
        ("ranks4", shape(experts_per_token=1), "bf16", False, 1e-3),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_sent_is_what_was_predicted(
    request: pytest.FixtureRequest, ranks: str, config: ModelConfig, coding: str, casts: bool, within: float
) -> None:
    pool: Pool = request.getfixturevalue(ranks)
    model = new_model(config)
    for rank, (trained, evaluated) in enumerate(pool.run(ledger_and_prediction, config, coding, casts)):
        for sent, predicted, losses in (trained, evaluated):
            assert sent == predicted and sent
            whole = [model(*micro(2 * rank + index)).item() for index in range(len(losses))]
            assert losses == pytest.approx(whole, rel=within)
    if coding != "none":
        assert trained[2][0] != evaluated[2][0], "nothing was coded"


def exchanged(rank: Rank, coding: str) -> tuple[Tensor, Tensor]:
    rows = torch.randn(rank.world_size, 3, 50, generator=torch.Generator().manual_seed(rank.rank))
    codec = make_codec(read_coding(coding, "codec"))
    return rows, swapped(rows, new_group(rank), codec, rank.ledger, "rows")


@pytest.mark.parametrize(("coding", "bound"), [("none", 0.0), ("int8", 0.02)])
def test_rows_change_places_and_ones_own_stays_exact(ranks2: Pool, coding: str, bound: float) -> None:
    found = ranks2.run(exchanged, coding)
    for me, (_, arrived) in enumerate(found):
        for other, (rows, _) in enumerate(found):
            error = (arrived[other] - rows[me]).abs().max().item()
            assert error <= bound and (error == 0.0) == (other == me or coding == "none")


# -- who has what -----------------------------------------------------------------------------------------------------


def held(rank: Rank, config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    model = new_model(config)
    experts.apply(model, new_group(rank), rank.ledger)
    return [(name, tuple(one.shape)) for name, one in model.named_parameters()]


def test_each_rank_has_its_experts_under_their_names_and_its_share_of_the_work(ranks2: Pool) -> None:
    config = shape()
    whole, seen = Workload.of_transformer(config, ROWS, LENGTH), set[str]()
    for rank, names in enumerate(ranks2.run(held, config)):
        workload = whole.of_expert_rank(config.experts, 2, rank)
        assert [(one.name, one.shape) for one in workload.parameters] == names
        before = [one.forward_flops_before for one in workload.parameters]
        assert before == sorted(before) and before[-1] <= workload.forward_flops_per_token == whole.forward_flops_per_token
        mine = {name for name, _ in names if is_of_expert(name)}
        assert len(mine) == 2 * 2 * 2 and not mine & seen
        seen |= mine
    assert seen == {one.name for one in whole.parameters if is_of_expert(one.name)}


def refusal(rank: Rank, model: nn.Module) -> str:
    try:
        experts.apply(model, new_group(rank), rank.ledger)
    except UserError as error:
        return str(error)
    return ""


def test_what_cannot_be_shared_out_is_refused(ranks2: Pool) -> None:
    assert all("a Linear has no experts" in line for line in ranks2.run(refusal, nn.Linear(4, 4)))
    assert all("model.experts = 0 cannot be shared" in line for line in ranks2.run(refusal, new_model(shape(experts=0))))
    with pytest.raises(UserError, match=r"layout.expert = 4: model.experts = 6 .* the nearest degree that can be taken is 3"):
        shape(experts=6).check_experts(4)
