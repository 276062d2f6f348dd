"""A pipeline gives what one rank with the whole model gives, for every schedule, and sends what it says."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from one_rank import train_on_one_rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import thinwire
from pool import Pool, Rank
from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import read_coding
from thinwire.config.model import ModelConfig
from thinwire.config.pipeline import PipelineSection
from thinwire.config.sync import EveryStep
from thinwire.errors import UserError
from thinwire.layout import AXES, Layout
from thinwire.models.transformer import Transformer, cross_entropy
from thinwire.parallel.chain import chain_of
from thinwire.parallel.cut import cut_model
from thinwire.parallel.pipeline import Pipeline
from thinwire.parallel.schedules import orders
from thinwire.sync.after_backward import AfterBackwardSync
from thinwire.traffic import Transfer
from thinwire.workload import Workload

pytestmark = pytest.mark.heavy

LENGTH, ROWS, STEPS, HELD_OUT = 12, 2, 4, 9
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev")


def shape(tied: bool = True, positions: str = "rotary") -> ModelConfig:
    return ModelConfig(
        layers=6, width=32, heads=4, kv_heads=2, vocabulary=50, context=16, tied=tied, positions=positions, dtype="float64"
    )


def new_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(3)
    return Transformer(config).double()


def micro(step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 50, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1000 * step + index))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def on_one_rank(config: ModelConfig, num_micro: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = new_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = train_on_one_rank(model, optimizer, STEPS, lambda step: [micro(step, index) for index in range(num_micro)])
    return losses, {name: one.detach().clone() for name, one in model.named_parameters()}


def train(
    rank: Rank, layout: Layout, options: PipelineSection, config: ModelConfig, num_micro: int, compress: str = "none"
) -> dict:
    mesh = init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)
    pipe, ledger = mesh.get_group("pipe"), rank.ledger
    model = new_model(config)
    cut = cut_model(model, micro(0, 0)[0], options, layout.pipe)
    pipeline = Pipeline(model, cut, pipe, ledger, cross_entropy)
    del model
    sync = AfterBackwardSync(EveryStep(), "data", ledger, make_exchange(read_coding(compress, "compress"), ledger))
    optimizer = torch.optim.AdamW(pipeline.owner.parameters(), lr=1e-2)
    replica, losses, sent = mesh.get_group("data").rank(), [], []
    with sync.attached(pipeline.owner, optimizer, mesh):
        for step in range(STEPS):
            before = ledger.snapshot()
            batches = [micro(step, replica * num_micro + index) for index in range(num_micro)]
            with sync.microbatch(last=True):
                found = pipeline.step([x for x, _ in batches], [y for _, y in batches], 1 / num_micro)
                pipeline.add_up_tied()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(sum(map(float, found)) / num_micro)
            sent.append(_sent(ledger, before))
        before = ledger.snapshot()
        held_out = [float(one) for one in pipeline.evaluate([micro(99, index) for index in range(HELD_OUT)])]
        evaluated = _sent(ledger, before)
    return {
        "losses": losses,
        "weights": {name: one.detach() for name, one in pipeline.owner.named_parameters()},
        "sent": sent[-1],
        "predicted": _calls(pipeline.traffic(num_micro)),
        "evaluated": evaluated,
        "predicted in evaluation": _calls(cut.evaluation_traffic(pipeline.rank, HELD_OUT)),
        "held_out": held_out,
        "order": [(one.kind, one.stage, one.micro) for one in sorted(pipeline.computed, key=lambda one: one.begin)],
        "last": pipeline.has_last,
    }


def _calls(transfers: list[Transfer]) -> dict:
    found = Counter()
    for transfer in transfers:
        found[transfer.label, transfer.op, transfer.message_bytes] += transfer.calls
    return dict(found)


def _sent(ledger: Ledger, before: dict) -> dict:
    from thinwire.collectives.ledger import difference

    after = difference(ledger.snapshot(), before)
    return {(call.label, call.op, call.message_bytes): total.calls for call, total in after.items() if call.op == "send"}


def check_equal(results: list[dict], layout: Layout, config: ModelConfig, num_micro: int) -> None:
    losses, weights = on_one_rank(config, num_micro * layout.data)
    for step, expected in enumerate(losses):
        got = sum(one["losses"][step] for one in results if one["last"]) / layout.data
        assert got == pytest.approx(expected, rel=1e-9)
    seen: dict[str, torch.Tensor] = {}
    for result in results:
        for name, value in result["weights"].items():
            assert torch.allclose(value, weights[name], rtol=1e-9, atol=1e-12), name
            assert torch.equal(value, seen.setdefault(name, value)), f"{name} differs between ranks"
    assert seen.keys() == weights.keys()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_of_two_equals_one_rank(ranks2: Pool, schedule: str) -> None:
    layout, config = Layout(pipe=2), shape()
    results = ranks2.run(train, layout, PipelineSection(schedule=schedule), config, 4)
    check_equal(results, layout, config, 4)
    for rank, result in enumerate(results):
        assert result["sent"] == result["predicted"]
        assert result["order"] == orders(schedule, 2, PipelineSection(schedule=schedule).per_rank, 4)[rank]


@pytest.mark.parametrize(
    ("schedule", "pipe", "tied"), [("1f1b", 4, False), ("interleaved", 2, True), ("zb1p", 2, True), ("gpipe", 2, False)]
)
def test_with_replicas_too(ranks4: Pool, schedule: str, pipe: int, tied: bool) -> None:
    layout = Layout(pipe=pipe, data=4 // pipe)
    config = shape(tied=tied, positions="learned")
    results = ranks4.run(train, layout, PipelineSection(schedule=schedule), config, 4)
    check_equal(results, layout, config, 4)
    for result in results:
        assert result["sent"] == result["predicted"]


@pytest.mark.parametrize(("activations", "gradients", "within"), [("int8", "int8", 0.01), ("bf16", "int4", 0.03)])
def test_codes_send_less_and_change_little(ranks2: Pool, activations: str, gradients: str, within: float) -> None:
    config = shape()
    options = PipelineSection(activations=activations, gradients=gradients)
    results = ranks2.run(train, Layout(pipe=2), options, config, 4)
    losses, _ = on_one_rank(config, 4)
    assert results[1]["losses"] == pytest.approx(losses, rel=within)
    assert results[1]["losses"] != pytest.approx(losses, rel=1e-12)
    for result in results:
        assert result["sent"] == result["predicted"]
        assert result["evaluated"] == result["predicted in evaluation"]
    whole = sum(size for label, _, size in results[0]["sent"] if label == "pipeline")
    assert whole < ROWS * LENGTH * 32 * 8 / 2
    plain = of_trained(results, config)
    assert results[1]["held_out"] == pytest.approx(plain, rel=1e-3) and results[1]["held_out"] != pytest.approx(plain, rel=1e-9)


def of_trained(results: list[dict], config: ModelConfig) -> list[float]:
    """Losses of the held-out micro-batches on one rank, with what all have trained."""
    model = new_model(config)
    model.load_state_dict({name: value for result in results for name, value in result["weights"].items()})
    return [model(*micro(99, index)).item() for index in range(HELD_OUT)]


def test_gradients_of_replicas_of_a_stage_are_coded(ranks4: Pool) -> None:
    results = ranks4.run(train, Layout(pipe=2, data=2), PipelineSection(), shape(), 4, "int8")
    seen: dict[str, torch.Tensor] = {}
    for result in results:
        for name, value in result["weights"].items():
            assert torch.equal(value, seen.setdefault(name, value)), f"{name} differs between ranks"


@pytest.mark.parametrize(("schedule", "last"), [("zbv", 0), ("interleaved", 1)])
def test_evaluation_is_the_whole_models(ranks2: Pool, schedule: str, last: int) -> None:
    """Of more micro-batches than are under way at once, whichever rank has the last stage."""
    results = ranks2.run(train, Layout(pipe=2), PipelineSection(schedule=schedule), shape(), 4)
    assert results[last]["held_out"] == pytest.approx(of_trained(results, shape()), rel=1e-12)
    assert results[1 - last]["held_out"] == []
    for result in results:
        assert result["evaluated"] == result["predicted in evaluation"]


def of_layers(rank: Rank) -> tuple[list[float], list[float]]:
    """A pipeline of an nn.Sequential whose boundaries differ in shape, beside the whole."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        layers = (nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 6), nn.Tanh(), nn.Linear(6, 3))
        return nn.Sequential(*layers).double()

    inputs = [torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    targets = [torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9 + i)) for i in range(2)]
    whole = build()
    expected = [nn.functional.mse_loss(whole(x), y).item() for x, y in zip(inputs, targets, strict=True)]
    pipeline = thinwire.pipeline(build(), inputs[0], nn.functional.mse_loss, schedule="gpipe")
    losses = [float(loss) for loss in pipeline.step(inputs, targets)]
    pipeline.step(inputs, targets)
    with pytest.raises(UserError, match="a step of 1 micro-batches, and the first one had 2"):
        pipeline.step(inputs[:1], targets[:1])
    sent = sum(transfer.calls * transfer.message_bytes for transfer in pipeline.traffic(2))
    before = pipeline.ledger.sent_bytes
    pipeline.step(inputs, targets)
    assert pipeline.ledger.sent_bytes - before == sent > 0
    return losses, expected


def test_any_sequential_model(ranks2: Pool) -> None:
    (nothing, _), (losses, expected) = ranks2.run(of_layers)
    assert nothing == []
    assert losses == pytest.approx(expected, rel=1e-12)


def over_metered_nccl(context: Rank) -> str:
    group = dist.group.WORLD
    group.coalesces = True
    try:
        Pipeline(None, None, group, context.ledger, None)  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    finally:
        group.coalesces = False
    return "nothing was refused"


def test_a_group_in_which_messages_would_wait_for_each_other_is_refused(ranks2: Pool) -> None:
    assert all("take collectives.kind = 'native'" in line for line in ranks2.run(over_metered_nccl))


def test_what_is_no_chain_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be cut into stages"):
        chain_of(nn.Linear(3, 3))


def test_workload_is_known_for_each_parameter_of_a_stage() -> None:
    config = shape()
    names = {parameter.name for parameter in Workload.of_transformer(config, ROWS, LENGTH).parameters}
    model = new_model(config)
    assert {name for name, _ in model.named_parameters()} == names


@pytest.mark.parametrize(("schedule", "num_micro"), [("1f1b", 9), ("dualpipev", 3)])
def test_a_number_of_micro_batches_that_cannot_be_is_refused_with_the_nearest_that_can(schedule: str, num_micro: int) -> None:
    per_rank = PipelineSection(schedule=schedule).per_rank
    with pytest.raises(UserError, match="cannot run") as raised:
        orders(schedule, 4, per_rank, num_micro)
    assert "\n" not in str(raised.value)
    nearest = int(str(raised.value).split("sync.accumulate to ")[1].split(",")[0])
    assert len(orders(schedule, 4, per_rank, nearest)) == 4
