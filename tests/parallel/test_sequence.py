"""Ranks that share sequences give what one rank with the whole sequences gives, in all mixtures, and send what they say."""

import time
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from sent import priced, sent_over
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from pool import Pool, Rank
from thinwire.bench.peers import rank as bench
from thinwire.bench.peers.layout_equality import learn, one_rank
from thinwire.collectives.clock import HostClock
from thinwire.collectives.ledger import difference
from thinwire.config.model import ModelConfig
from thinwire.config.pipeline import PipelineSection
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import AXES, Layout, check_sequence
from thinwire.models.transformer import Transformer, causal_attention
from thinwire.parallel import sequence, sequence_attention, tensor
from thinwire.parallel.cut import cut_model
from thinwire.parallel.pipeline import Pipeline
from thinwire.parallel.sequence import Share
from thinwire.parallel.sequence_attention import Ring, pairs
from thinwire.parallel.tensor_parts import local_workload
from thinwire.parallel.waits import Waits
from thinwire.plan.memory import ALLOCATOR, activations_bytes
from thinwire.workload import Workload

pytestmark = pytest.mark.heavy

LENGTH, ROWS, VOCABULARY = 16, 2, 51


def shape(**changes: object) -> ModelConfig:
    fields = {"layers": 2, "width": 32, "heads": 4, "hidden": 24, "vocabulary": VOCABULARY, "context": 16, "dtype": "float64"}
    return ModelConfig.model_validate({**fields, **changes})


LLAMA = shape(kv_heads=2)
GPT = shape(mlp="gelu", norm="layer", positions="learned", tied=False)


def new_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(3)
    return Transformer(config).to(getattr(torch, config.dtype))


def micro(hidden: range = range(0)) -> tuple[Tensor, Tensor]:
    """hidden: places whose targets do not count."""
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[:, hidden.start : hidden.stop] = -100
    return tokens[:, :-1].contiguous(), targets


def new_group(rank: Rank) -> dist.ProcessGroup:
    return init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("seq",)).get_group()


# -- who has what -----------------------------------------------------------------------------------------------------


@given(degree=st.integers(2, 6), width=st.integers(1, 2))
def test_all_pairs_are_seen_once_and_each_turn_is_equal_work(degree: int, width: int) -> None:
    length = 2 * degree * width
    owned = [Share(degree, rank).of(torch.arange(length)).tolist() for rank in range(degree)]
    assert sorted(place for one in owned for place in one) == list(range(length))
    seen: set[tuple[int, int]] = set()
    for turn in range(degree):
        counts = set()
        for rank, queries in enumerate(owned):
            rows, columns = pairs(turn, rank, len(queries))
            keys = owned[(rank - turn) % degree]
            found = {(q, k) for q, k in product(queries[rows], keys[columns]) if turn or k <= q}
            assert all(k <= q for q, k in found) and not found & seen
            seen |= found
            counts.add(len(found))
        assert len(counts) == 1, "some rank has more to do"
    assert seen == {(q, k) for q in range(length) for k in range(q + 1)}


@pytest.mark.parametrize(("tokens", "degree", "nearest"), [(12, 4, 3), (16, 3, 2), (7, 2, 1), (96, 5, 4), (40, 32, 20)])
def test_a_sequence_that_cannot_be_cut_is_refused_with_the_nearest_degree(tokens: int, degree: int, nearest: int) -> None:
    with pytest.raises(UserError, match=rf"layout.seq = {degree}: .* {tokens} tokens are no .* taken is {nearest}$"):
        check_sequence(tokens, degree)


def refusal(rank: Rank, model: nn.Module) -> str:
    try:
        sequence.apply(model, new_group(rank), rank.ledger)
        model(torch.zeros(1, 10, dtype=torch.int64))
    except UserError as error:
        return str(error)
    return ""


def test_another_model_and_another_length_are_refused(ranks2: Pool) -> None:
    assert all("a Linear cannot share out sequences" in line for line in ranks2.run(refusal, nn.Linear(4, 4)))
    assert all("10 tokens are no multiple of 4" in line for line in ranks2.run(refusal, new_model(LLAMA)))


# -- attention --------------------------------------------------------------------------------------------------------


def qkv(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries of 4 heads, keys and values of 2, and a gradient of what comes out."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64).to(dtype) for heads in (4, 2, 2, 4)]


def attended(rank: Rank, length: int, dtype: torch.dtype, keeps: bool, tile: int) -> list[Tensor]:
    """y, and the gradients of q, k and v, of this rank's tokens."""
    group, before = new_group(rank), sequence_attention.TILE
    share = Share(group.size(), group.rank())
    q, k, v, dy = (share.of(one.mT).mT.contiguous() for one in qkv(length, dtype))
    sequence_attention.TILE = tile
    try:
        inputs = [one.requires_grad_() for one in (q, k, v)]
        y = Ring(group, rank.ledger, keeps).attend(*inputs)
        y.backward(dy)
    finally:
        sequence_attention.TILE = before
    return [y.detach(), *(one.grad for one in inputs if one.grad is not None)]


@pytest.mark.parametrize(
    ("ranks", "length", "dtype", "keeps", "tile", "within"),
    [
        ("ranks2", 24, torch.float64, True, 2**20, 1e-12),
        ("ranks2", 24, torch.bfloat16, True, 2**20, 2e-2),
        ("ranks4", 32, torch.float32, False, 2**20, 1e-5),
        ("ranks4", 32, torch.float64, False, 2**20, 1e-12),
        ("ranks4", 32, torch.float64, True, 100, 1e-12),
    ],
)
def test_attention_is_that_of_the_whole_sequence(
    request: pytest.FixtureRequest, ranks: str, length: int, dtype: torch.dtype, keeps: bool, tile: int, within: float
) -> None:
    pool: Pool = request.getfixturevalue(ranks)
    q, k, v, dy = (one.double() for one in qkv(length, dtype))
    y = causal_attention(*(one.requires_grad_() for one in (q, k, v)))
    y.backward(dy)
    for rank, found in enumerate(pool.run(attended, length, dtype, keeps, tile)):
        share = Share(pool.world_size, rank)
        for got, expected in zip(found, (y.detach(), q.grad, k.grad, v.grad), strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), share.of(expected.mT).mT, rtol=within, atol=within)


def paced_attention(rank: Rank, turn_s: float) -> list[float]:
    """Seconds of a forward, a backward and an evaluation pass with such turns, and those that the ring waited in the first two:
    of some tries the least, for a busy machine wakes a sleeper late, but never early."""
    group, waits = new_group(rank), Waits(HostClock())
    ring = Ring(group, rank.ledger, waits=waits)
    ring.turn_s = turn_s
    tries = []
    for _ in range(5):
        q, k, v, dy = (one.requires_grad_() for one in qkv(LENGTH, torch.float32))
        waits.clear()
        moments = [time.perf_counter()]
        y = ring.attend(q, k, v)
        moments.append(time.perf_counter())
        y.backward(dy)
        moments.append(time.perf_counter())
        waited_s = waits.seconds()
        with torch.no_grad():
            ring.attend(q, k, v)
        moments.append(time.perf_counter())
        tries.append([*(end - begin for begin, end in pairwise(moments)), waited_s])
    return [min(several) for several in zip(*tries, strict=True)]


@pytest.mark.timed
def test_paced_turns_take_as_long_as_declared_and_messages_travel_meanwhile(ranks2: Pool) -> None:
    """So what hides under a turn is no waiting; evaluation is not paced."""
    turn_s = 0.05
    for forward_s, backward_s, evaluation_s, waited_s in ranks2.run(paced_attention, turn_s):
        assert 2 * turn_s <= forward_s < 3 * turn_s and 4 * turn_s <= backward_s < 6 * turn_s
        assert evaluation_s < turn_s and waited_s < turn_s


# -- the model --------------------------------------------------------------------------------------------------------


def gradients_of(
    rank: Rank, config: ModelConfig, hidden: range, checkpoints: bool = False
) -> tuple[float, dict[str, Tensor], Tensor]:
    model = new_model(config)
    sequence.apply(model, new_group(rank), rank.ledger, keeps=not checkpoints)
    if checkpoints:
        for block in model.blocks:
            block.forward = _recomputed(block.forward)
    loss = model(*micro(hidden))
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters()}, model(micro()[0]).detach()


def _recomputed(forward: Any) -> Any:
    return lambda *arguments: checkpoint(forward, *arguments, use_reentrant=False)


@pytest.mark.parametrize(
    ("config", "hidden", "checkpoints"),
    [(LLAMA, range(0), False), (GPT, range(4, 12), False), (GPT, range(3, 6), False), (LLAMA, range(9, 16), True)],
    ids=["llama", "a rank without targets", "unequal targets", "recomputed"],
)
def test_means_over_ranks_are_the_whole_sequences_loss_and_gradient(
    ranks2: Pool, config: ModelConfig, hidden: range, checkpoints: bool
) -> None:
    model = new_model(config)
    loss = model(*micro(hidden))
    loss.backward()
    results = ranks2.run(gradients_of, config, hidden, checkpoints)
    assert sum(found for found, _, _ in results) / 2 == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        mean = sum(found[name] for _, found, _ in results) / 2
        assert torch.allclose(mean, parameter.grad, rtol=1e-9, atol=1e-14), name
    logits = model(micro()[0]).detach()
    for rank, (_, _, own) in enumerate(results):
        torch.testing.assert_close(own.mT, Share(2, rank).of(logits.mT), rtol=1e-10, atol=1e-12)


def kept_bytes(rank: Rank, config: ModelConfig, degree: int, keeps: bool) -> int:
    """By autograd between a forward and a backward pass, without the parameters."""
    model = new_model(config)
    if degree > 1:
        sequence.apply(model, new_group(rank), rank.ledger, keeps=keeps)
    parameters = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        kept.setdefault(value.untyped_storage().data_ptr(), value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model(*micro())
    return sum(one.untyped_storage().nbytes() for place, one in kept.items() if place not in parameters)


def test_a_rank_keeps_its_share_of_activations_and_what_keys_and_values_it_is_to_keep(ranks2: Pool) -> None:
    config = shape(layers=3, kv_heads=2, width=64, dtype="float32")
    whole, shared, keeping = (ranks2.run(kept_bytes, config, *case)[0] for case in ((1, True), (2, False), (2, True)))
    assert 0.5 < shared / whole < 0.55
    assert keeping - shared == 3 * 2 * ROWS * (LENGTH // 2) * config.kv_heads * config.head_width * 4


def test_a_block_keeps_the_memory_that_is_predicted(ranks2: Pool) -> None:
    def predicted(config: ModelConfig) -> float:
        workload = local_workload(Workload.of_transformer(config, ROWS, LENGTH), config, 1, seq=2)
        return activations_bytes(config, workload, casts=False, seq=2) / ALLOCATOR

    short, long = (shape(layers=layers, width=64, hidden=128, kv_heads=2, dtype="float32") for layers in (1, 4))
    kept = [ranks2.run(kept_bytes, config, 2, True)[0] for config in (short, long)]
    assert kept[1] - kept[0] == pytest.approx(predicted(long) - predicted(short), rel=0.05)


# -- what is sent -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    layout: Layout
    config: ModelConfig
    keeps: bool = True
    casts: bool = False

    def __str__(self) -> str:
        return f"{self.layout}, {self.config.dtype}, keeps {self.keeps}, casts {self.casts}"


def ledger_and_prediction(rank: Rank, case: Case) -> list[tuple[dict, dict]]:
    """Of a training pass of two micro-batches and of one evaluation, over the axes within a replica."""
    mesh = init_device_mesh("cpu", case.layout.degrees, mesh_dim_names=AXES)
    groups, ledger, layout = {axis: mesh.get_group(axis) for axis in AXES}, rank.ledger, case.layout
    model, pipeline, units = new_model(case.config), None, None
    tensor.apply(model, groups["tensor"], ledger)
    sequence.apply(model, groups["seq"], ledger, keeps=case.keeps)
    if layout.pipe > 1:
        cut = cut_model(model, micro()[0], PipelineSection(schedule="zb1p"), layout.pipe)
        pipeline = Pipeline(model, cut, groups["pipe"], ledger, model.loss)
        units = [unit for stage in cut.stages_of(pipeline.rank) for unit in cut.stages[stage]]
        pipeline.step([micro()[0]] * 2, [micro()[1]] * 2)  # the first step sends more
    before = ledger.snapshot()
    if pipeline is not None:
        pipeline.step([micro()[0]] * 2, [micro()[1]] * 2)
    else:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=case.casts):
                loss = model(*micro())
            loss.backward()
    between = ledger.snapshot()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case.casts):
        pipeline.evaluate([micro()]) if pipeline is not None else model(*micro())
    trained, evaluated = difference(between, before), difference(ledger.snapshot(), between)
    passes = tensor.Passes(micro_batch=ROWS, sequence=LENGTH // layout.seq, num_micro=2, units=units, casts=case.casts)
    evaluation = replace(passes, num_micro=1, evaluates=True)
    config, degrees = case.config, {"tensor": layout.tensor, "keeps": case.keeps}
    found = []
    for sent, these in ((trained, passes), (evaluated, evaluation)):
        predicted = sequence.traffic(config, layout.seq, these, **degrees)
        found.append((_sends(sent_over("seq", sent)), priced(predicted, groups["seq"])))
        if layout.tensor > 1:
            found.append((sent_over("tensor", sent), priced(tensor.traffic(config, layout.tensor, these), groups["tensor"])))
    if pipeline is not None:
        found.append((_sends(sent_over("pipe", trained)), priced(pipeline.traffic(2), groups["pipe"])))
    return found


def _sends(sent: dict) -> dict:
    """Without what was received, which is no bytes."""
    return {key: found for key, found in sent.items() if key[1] == "send"}


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        ("ranks2", Case(Layout(seq=2), LLAMA)),
        ("ranks2", Case(Layout(seq=2), GPT, keeps=False)),
        ("ranks2", Case(Layout(seq=2), shape(dtype="float32"), casts=True)),
        ("ranks2", Case(Layout(seq=2), shape(kv_heads=1, dtype="bfloat16"))),
        ("ranks4", Case(Layout(seq=4), GPT, keeps=False)),
        ("ranks4", Case(Layout(seq=2, tensor=2), LLAMA)),
        ("ranks4", Case(Layout(pipe=2, seq=2), GPT)),
    ],
    ids=str,
)
def test_what_is_sent_is_what_was_predicted(request: pytest.FixtureRequest, ranks: str, case: Case) -> None:
    pool: Pool = request.getfixturevalue(ranks)
    for found in pool.run(ledger_and_prediction, case):
        for sent, predicted in found:
            assert sent == predicted and sent


# -- training ---------------------------------------------------------------------------------------------------------


def learned(rank: Rank, config: RunConfig, layout: Layout, folder: Path) -> list[float]:
    losses: list[float] = learn(config, layout, bench.Rank({}, folder, ledger=rank.ledger))
    return losses


def run_of(folder: Path, sync: dict[str, Any], *, rare: bool) -> RunConfig:
    """rare: among replicas that average parameters after each step, which equals one rank under plain SGD only."""
    text = folder / "text.txt"
    text.write_text("thin wires carry few bytes, and thick books many words; " * 200, encoding="utf-8")
    train = {"steps": 6, "micro_batch": 1, "sequence": LENGTH, "learning_rate": 1e-2, "warmup_steps": 2, "eval_tokens": 256}
    return RunConfig.model_validate(
        {
            "model": {"layers": 4, "width": 16, "heads": 4, "kv_heads": 2, "context": 16, "dtype": "float64", "init_std": 0.1},
            "data": {"source": str(text), "cache": str(folder / "cache")},
            "train": train | ({"clip": 0, "optimizer": {"kind": "sgd", "momentum": 0.0}} if rare else {}),
            "sync": sync,
        }
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [
        Layout(seq=2),
        Layout(data=2, seq=2),
        Layout(seq=4),
        Layout(outer=2, seq=2),
        Layout(pipe=2, seq=2),
        Layout(seq=2, tensor=2),
    ],
    ids=str,
)
def test_training_equals_one_rank(request: pytest.FixtureRequest, tmp_path: Path, layout: Layout) -> None:
    pool: Pool = request.getfixturevalue(f"ranks{layout.world_size}")
    rare, num_micro = layout.outer > 1, 4
    alone = one_rank(run_of(tmp_path, {"accumulate": num_micro}, rare=rare), tmp_path)
    kind = {"kind": "local_sgd", "every": 1} if rare else {}
    config = run_of(tmp_path, {"accumulate": num_micro // layout.replicas, **kind}, rare=rare)
    for losses in pool.run(learned, config, layout, tmp_path):
        assert losses == pytest.approx(alone, rel=1e-9)
