"""Tensor ranks give what one rank with the whole model gives, alone, with replicas and in a pipeline; and send what they say."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_rank import train_on_one_rank
from sent import priced, sent_over
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank, RankFailure
from thinwire.collectives.ledger import difference
from thinwire.compress.base import make_codec
from thinwire.config.compress import read_coding
from thinwire.config.model import ModelConfig
from thinwire.config.pipeline import PipelineSection
from thinwire.config.sync import EveryStep
from thinwire.errors import UserError
from thinwire.layout import AXES, Layout
from thinwire.models.transformer import Transformer, cross_entropy
from thinwire.parallel import tensor
from thinwire.parallel.cut import cut_model
from thinwire.parallel.pipeline import Pipeline
from thinwire.parallel.tensor_boundary import boundary_traffic, split_boundaries
from thinwire.parallel.tensor_loss import tensor_cross_entropy
from thinwire.parallel.tensor_parts import local_workload, parts_of, words_of
from thinwire.parallel.tensor_state import part, whole
from thinwire.plan.memory import ALLOCATOR, activations_bytes
from thinwire.sync.after_backward import AfterBackwardSync
from thinwire.workload import Workload

pytestmark = pytest.mark.heavy

LENGTH, ROWS, STEPS, MICRO, VOCABULARY, CLIP = 12, 2, 4, 2, 51, 0.5


def shape(**changes: object) -> ModelConfig:
    fields = {"layers": 2, "width": 32, "heads": 4, "hidden": 24, "vocabulary": VOCABULARY, "context": 16, "dtype": "float64"}
    return ModelConfig.model_validate({**fields, **changes})


LLAMA = shape(kv_heads=2)
GPT = shape(mlp="gelu", norm="layer", positions="learned", tied=False)
GROUPS = shape(heads=9, kv_heads=3, width=36)
"""Groups that two ranks cannot share out evenly, as SmolLM2 has them."""
ODD = shape(heads=5, width=15, hidden=13, mlp="gelu", norm="layer", positions="learned", tied=False)
"""Nothing of it can be halved, the width of a boundary neither."""


@dataclass(frozen=True)
class Case:
    layout: Layout
    config: ModelConfig
    codec: str = "none"
    schedule: str = ""
    boundary: str = "none"

    @property
    def clips(self) -> bool:
        return self.layout.pipe == 1


def new_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(3)
    return Transformer(config).to(getattr(torch, config.dtype))


def micro(step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, index % 3] = -100
    return tokens[:, :-1].contiguous(), targets


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def on_one_rank(case: Case) -> tuple[list[float], Transformer]:
    model, num_micro = new_model(case.config), MICRO * case.layout.data
    losses = train_on_one_rank(
        model,
        optimizer_of(model),
        STEPS,
        lambda step: [micro(step, index) for index in range(num_micro)],
        clip=CLIP if case.clips else 0.0,
    )
    return losses, model


def train(rank: Rank, case: Case) -> dict:
    mesh, ledger, layout = init_device_mesh("cpu", case.layout.degrees, mesh_dim_names=AXES), rank.ledger, case.layout
    group, replica = mesh.get_group("tensor"), mesh.get_group("data").rank()
    codec = make_codec(read_coding(case.codec, "tensor.codec"))
    model = new_model(case.config)
    parts = tensor.apply(model, group, ledger, codec)
    pipeline, owner, units = None, model, None
    if layout.pipe > 1:
        options = PipelineSection(schedule=case.schedule, activations=case.boundary, gradients=case.boundary)
        whole_cut = cut_model(model, micro(0, 0)[0], options, layout.pipe)
        cut = split_boundaries(whole_cut, group, ledger)
        pipeline = Pipeline(model, cut, mesh.get_group("pipe"), ledger, model.loss)
        owner, units = pipeline.owner, [unit for stage in cut.stages_of(pipeline.rank) for unit in cut.stages[stage]]
    sync, optimizer = AfterBackwardSync(EveryStep(), "data", ledger), optimizer_of(owner)
    losses, gradients = [], {}
    with sync.attached(owner, optimizer, mesh):
        for step in range(STEPS):
            before = ledger.snapshot()
            batches = [micro(step, replica * MICRO + index) for index in range(MICRO)]
            with sync.microbatch(last=True):
                if pipeline is not None:
                    found = pipeline.step([x for x, _ in batches], [y for _, y in batches], 1 / MICRO)
                    pipeline.add_up_tied()
                else:
                    found = [model(x, y) for x, y in batches]
                    for loss in found:
                        (loss / MICRO).backward()
            if case.clips:
                norm = tensor.gradient_norm(owner.named_parameters(), parts, group, ledger)
                nn.utils.clip_grads_with_norm_(owner.parameters(), CLIP, norm)
            gradients = {name: one.grad.clone() for name, one in owner.named_parameters() if name not in parts}
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(sum(map(float, found)) / MICRO)
            step_sent = difference(ledger.snapshot(), before)
    passes = tensor.Passes(micro_batch=ROWS, sequence=LENGTH, num_micro=MICRO, units=units, clips=case.clips)
    transfers, along_pipe = tensor.traffic(case.config, group.size(), passes, codec), []
    in_evaluation = tensor.traffic(case.config, group.size(), replace(passes, num_micro=1, clips=False, evaluates=True), codec)
    if pipeline is not None:
        in_evaluation += boundary_traffic(cut, pipeline.rank, group.size(), 1, evaluates=True)
        transfers += boundary_traffic(cut, pipeline.rank, group.size(), MICRO)
        along_pipe = pipeline.traffic(MICRO)
        for boundary, whole_one in enumerate(whole_cut.crossing):
            width, crosses = case.config.width, cut.crosses(boundary)
            expected = (*whole_one.shape[:-1], -(-width // layout.tensor)) if crosses else whole_one.shape
            assert cut.crossing[boundary].shape == expected
    workload = local_workload(Workload.of_transformer(case.config, ROWS, LENGTH), case.config, group.size(), group.rank())
    of_replicas = priced(sync.traffic(workload, layout), mesh.get_group("data"))
    before = ledger.snapshot()
    with torch.no_grad():
        held_out = pipeline.evaluate([micro(99, 0)]) if pipeline is not None else [model(*micro(99, 0))]
    return {
        "place": layout.coordinates(rank.rank),
        "losses": losses if pipeline is None or pipeline.has_last else [],
        "weights": {name: one.detach() for name, one in owner.named_parameters()},
        "whole": gradients,
        "sent": sent_over("tensor", step_sent),
        "predicted": priced(transfers, group),
        "sent to replicas": sent_over("data", step_sent) if layout.data > 1 else {},
        "predicted to replicas": of_replicas if layout.data > 1 else {},
        "sent along the pipe": {key: sent for key, sent in sent_over("pipe", step_sent).items() if key[1] == "send"},
        "predicted along the pipe": priced(along_pipe, mesh.get_group("pipe")),
        "held_out": [float(one) for one in held_out],
        "sent in evaluation": sent_over("tensor", difference(ledger.snapshot(), before)),
        "predicted in evaluation": priced(in_evaluation, group),
    }


def by_group(results: list[dict]) -> list[list[dict]]:
    """Results of ranks that differ on the tensor axis only."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["place"]["pipe"], result["place"]["data"]), []).append(result)
    return list(groups.values())


def check_alike(results: list[dict]) -> None:
    """Ledger and prediction; and the bits of what several ranks hold."""
    for result in results:
        assert result["sent"] == result["predicted"] and result["sent"]
        assert result["sent to replicas"] == result["predicted to replicas"]
        assert result["sent along the pipe"] == result["predicted along the pipe"]
        assert result["sent in evaluation"] == result["predicted in evaluation"]
    for group in by_group(results):
        for one, other in pairwise(group):
            assert one["losses"] == other["losses"] and one["held_out"] == other["held_out"]
            assert one["whole"].keys() == other["whole"].keys() and one["whole"]
            for name, gradient in one["whole"].items():
                assert torch.equal(gradient, other["whole"][name]), f"the gradient of {name} differs between ranks"
                assert torch.equal(one["weights"][name], other["weights"][name]), f"{name} differs between ranks"


def check_equal(results: list[dict], case: Case) -> None:
    check_alike(results)
    losses, model = on_one_rank(case)
    with_losses = [one["losses"] for one in results if one["losses"]]
    for step, expected in enumerate(losses):
        assert sum(one[step] for one in with_losses) / len(with_losses) == pytest.approx(expected, rel=1e-9)
    held_out = model(*micro(99, 0)).item()
    assert all(one["held_out"] == pytest.approx([held_out], rel=1e-9) for one in results if one["held_out"])
    expected_weights = {name: one.detach() for name, one in model.named_parameters()}
    seen: set[str] = set()
    for group in by_group(results):
        for name, value in whole([one["weights"] for one in group], case.config).items():
            assert torch.allclose(value, expected_weights[name], rtol=1e-9, atol=1e-12), name
            seen.add(name)
        for result in group:
            degree, place = case.layout.tensor, result["place"]["tensor"]
            again = part(whole([one["weights"] for one in group], case.config), case.config, degree, place)
            assert all(torch.equal(again[name], value) for name, value in result["weights"].items()), "padding is not zero"
    assert seen == expected_weights.keys()


CASES = [
    (Case(Layout(tensor=2), LLAMA), "llama"),
    (Case(Layout(tensor=2), GPT), "gpt"),
    (Case(Layout(tensor=2), ODD), "five heads"),
    (Case(Layout(tensor=2), GROUPS), "three groups of nine heads"),
]


@pytest.mark.parametrize("case", [case for case, _ in CASES], ids=[name for _, name in CASES])
def test_two_tensor_ranks_equal_one(ranks2: Pool, case: Case) -> None:
    results = ranks2.run(train, case)
    check_equal(results, case)
    whole_workload = Workload.of_transformer(case.config, ROWS, LENGTH)
    for rank, result in enumerate(results):
        shapes = {one.name: one.shape for one in local_workload(whole_workload, case.config, 2, rank).parameters}
        assert shapes == {name: tuple(one.shape) for name, one in result["weights"].items()}


@pytest.mark.parametrize(
    "case",
    [
        Case(Layout(tensor=4), shape(tied=False)),
        Case(Layout(tensor=2, data=2), LLAMA),
        Case(Layout(tensor=2, pipe=2), LLAMA, schedule="1f1b"),
        Case(Layout(tensor=4), shape(heads=10, kv_heads=5, width=40)),
        Case(Layout(tensor=2, data=2), GROUPS),
        Case(Layout(tensor=2, pipe=2), ODD, schedule="1f1b"),
        pytest.param(Case(Layout(tensor=4), GPT), marks=pytest.mark.long),
        pytest.param(Case(Layout(tensor=2, data=2), GPT), marks=pytest.mark.long),
        pytest.param(Case(Layout(tensor=2, pipe=2), GPT, schedule="zb1p"), marks=pytest.mark.long),
        pytest.param(Case(Layout(tensor=2, pipe=2), LLAMA, schedule="zbv"), marks=pytest.mark.long),
    ],
    ids=lambda case: f"{case.layout} {case.config.mlp} {case.config.heads} heads {case.schedule}",
)
def test_four_ranks_equal_one(ranks4: Pool, case: Case) -> None:
    check_equal(ranks4.run(train, case), case)


@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
def test_coded_sums_send_less_and_learn_alike(ranks2: Pool, codec: str) -> None:
    case = Case(Layout(tensor=2), LLAMA, codec)
    results = ranks2.run(train, case)
    check_alike(results)
    losses, _ = on_one_rank(case)
    assert results[0]["losses"] == pytest.approx(losses, rel=0.01)
    assert results[0]["losses"] != pytest.approx(losses, rel=1e-12)
    assert not any(label in ("activations", "activation gradients") for label, _, _ in results[0]["sent"])


@pytest.mark.parametrize("layout", [Layout(tensor=4), Layout(tensor=2, pipe=2), Layout(tensor=2, data=2)], ids=str)
@pytest.mark.long
def test_coded_sums_of_four_ranks(ranks4: Pool, layout: Layout) -> None:
    case = Case(layout, shape(), "int8", schedule="1f1b", boundary="int8")
    results = ranks4.run(train, case)
    check_alike(results)
    losses, _ = on_one_rank(case)
    got = [one["losses"] for one in results if one["losses"]]
    assert [sum(step) / len(got) for step in zip(*got, strict=True)] == pytest.approx(losses, rel=0.01)


def under_autocast(rank: Rank) -> tuple[dict, dict, float]:
    config = LLAMA.model_copy(update={"dtype": "float32"})
    mesh, model = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)), new_model(config)
    tensor.apply(model, mesh.get_group(), rank.ledger)
    before = rank.ledger.snapshot()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*micro(0, 0))
    loss.backward()
    sent = sent_over("tensor", difference(rank.ledger.snapshot(), before))
    passes = tensor.Passes(micro_batch=ROWS, sequence=LENGTH, casts=True)
    return sent, priced(tensor.traffic(config, 2, passes), mesh.get_group()), loss.item()


def test_under_autocast_products_are_added_up_in_16_bits(ranks2: Pool) -> None:
    for sent, predicted, loss in ranks2.run(under_autocast):
        assert sent == predicted
        assert loss == pytest.approx(new_model(LLAMA.model_copy(update={"dtype": "float32"}))(*micro(0, 0)).item(), rel=0.01)


def wide(layers: int) -> ModelConfig:
    return shape(layers=layers, heads=6, kv_heads=3, width=96, hidden=193, dtype="float32")


def kept_bytes(rank: Rank, layers: int) -> int:
    """By autograd between a forward and a backward pass, without the parameters."""
    config = wide(layers)
    mesh, model = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)), new_model(config)
    tensor.apply(model, mesh.get_group(), rank.ledger)
    parameters = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.setdefault(value.untyped_storage().data_ptr(), value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model(*micro(0, 0))
    return sum(one.untyped_storage().nbytes() for place, one in kept.items() if place not in parameters)


def test_a_block_keeps_the_memory_that_is_predicted(ranks2: Pool) -> None:
    def predicted(layers: int, rank: int) -> float:
        config = wide(layers)
        workload = local_workload(Workload.of_transformer(config, ROWS, LENGTH), config, 2, rank)
        return activations_bytes(config, workload, casts=False) / ALLOCATOR

    for rank, (short, long) in enumerate(zip(ranks2.run(kept_bytes, 1), ranks2.run(kept_bytes, 4), strict=True)):
        assert long - short == pytest.approx(predicted(4, rank) - predicted(1, rank), rel=0.05)


# -- the loss ---------------------------------------------------------------------------------------------------------


def losses_and_gradients(rank: Rank, vocabulary: int, targets: torch.Tensor, scale: float) -> tuple[float, torch.Tensor, int]:
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("tensor",))
    words = words_of(vocabulary, rank.world_size, rank.rank)
    logits = scale * torch.randn(*targets.shape, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    local = torch.full((*targets.shape, -(-vocabulary // rank.world_size)), 7.0 * scale, dtype=torch.float64)
    local[..., : len(words)] = logits[..., words.start : words.stop]
    local.requires_grad_()
    loss = tensor_cross_entropy(mesh.get_group(), rank.ledger, vocabulary)(local, targets)
    (3.0 * loss).backward()
    return loss.item(), local.grad, len(words)


@pytest.mark.parametrize(("vocabulary", "scale"), [(51, 1.0), (5, 1.0), (8, 1e4)])
def test_the_loss_is_that_of_the_whole_logits(ranks4: Pool, vocabulary: int, scale: float) -> None:
    targets = torch.randint(0, vocabulary, (2, 6), generator=torch.Generator().manual_seed(1))
    targets[0, 0], targets[1, 5] = -100, vocabulary - 1
    logits = scale * torch.randn(2, 6, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    expected = cross_entropy(logits, targets)
    (3.0 * expected).backward()
    results = ranks4.run(losses_and_gradients, vocabulary, targets, scale)
    assert len({loss for loss, _, _ in results}) == 1
    assert results[0][0] == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.cat([gradient[..., :words] for _, gradient, words in results], dim=-1)
    assert torch.allclose(gradients, logits.grad, rtol=1e-10, atol=1e-14)
    assert all(not gradient[..., words:].any() for _, gradient, words in results), "padding has a gradient"


def test_a_token_outside_of_the_vocabulary_is_refused(ranks2: Pool) -> None:
    with pytest.raises(RankFailure, match="token 51 is none of the model's 51"):
        ranks2.run(losses_and_gradients, 51, torch.tensor([[1, 51]]), 1.0)


# -- parts ------------------------------------------------------------------------------------------------------------

SHAPES = st.builds(
    lambda kv_heads, per, hidden, vocabulary, mlp, tied, positions: shape(
        layers=1, heads=kv_heads * per, kv_heads=kv_heads, width=2 * kv_heads * per, hidden=hidden, vocabulary=vocabulary,
        mlp=mlp, tied=tied, positions=positions,
    ),
    st.integers(4, 8), st.integers(1, 3), st.integers(4, 20), st.integers(1, 20),
    st.sampled_from(["gelu", "swiglu"]), st.booleans(), st.sampled_from(["rotary", "learned"]),
)  # fmt: skip


@given(config=SHAPES, degree=st.integers(1, 4))
def test_parts_of_all_ranks_make_the_whole_and_come_out_of_it_again(config: ModelConfig, degree: int) -> None:
    state = dict(Transformer(config).state_dict())
    states = [part(state, config, degree, rank) for rank in range(degree)]
    again = whole(states, config)
    assert again.keys() == state.keys() and all(torch.equal(again[name], value) for name, value in state.items())
    for rank in range(degree):
        local, parts = part(again, config, degree, rank), parts_of(config, degree, rank)
        for name, value in states[rank].items():
            assert torch.equal(local[name], value) and value.numel()
            if name in parts and parts[name].padding:
                assert not value[-parts[name].padding :].any()
    for name, first in parts_of(config, degree, 0).items():
        held = [index for rank in range(degree) for one in parts_of(config, degree, rank)[name].ranges for index in one]
        assert sorted(held) == list(range(state[name].shape[first.dim])), "each row is on one rank"


def test_a_rank_with_more_heads_has_less_of_the_rest() -> None:
    """SmolLM2-135M over two ranks: parameters and operations of both differ by little, though one has twice the heads."""
    smol = ModelConfig.model_validate(
        {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "hidden": 1536, "vocabulary": 49_152, "context": 2048}
    )
    whole_one = Workload.of_transformer(smol, 1, 128)
    first, second = (local_workload(whole_one, smol, 2, rank) for rank in range(2))
    assert first.parameter("blocks.0.attention.out.weight").shape[1] == 6 * 64
    assert first.num_parameters == pytest.approx(second.num_parameters, rel=0.005)
    assert first.forward_flops_per_token == pytest.approx(second.forward_flops_per_token, rel=0.03)
    both = first.forward_flops_per_token + second.forward_flops_per_token
    assert both == pytest.approx(whole_one.forward_flops_per_token, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "degree", "said"),
    [
        (
            {"heads": 8, "kv_heads": 2},
            4,
            r"tensor = 4: each rank takes one head of keys.* model.kv_heads = 2; .* 2 or less",
        ),
        ({}, 5, r"model.kv_heads = 4; take layout.tensor = 4 or less"),
        ({"hidden": 3}, 4, r"one value of the MLP's at least, and model.hidden = 3; take layout.tensor = 3 or less"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_the_nearest_degree(changes: dict, degree: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        shape(**changes).check_tensor(degree)


def test_another_model_is_refused(ranks2: Pool) -> None:
    assert all("a Linear cannot be split" in line for line in ranks2.run(refusal))


def refusal(rank: Rank) -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    try:
        tensor.apply(nn.Linear(4, 4), mesh.get_group(), rank.ledger)
    except UserError as error:
        return str(error)
    return ""
