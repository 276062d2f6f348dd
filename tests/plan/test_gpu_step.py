"""Laws of the model of a step on accelerators: counts, collectives and bubbles that others know, and what more must not do."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.cluster import FRAME_OVERHEAD
from thinwire.cluster.equal import equal_hosts
from thinwire.cluster.graph import Routes
from thinwire.collectives.price import price
from thinwire.config.model import preset
from thinwire.parallel.schedules import orders
from thinwire.plan.gpu.job import Job
from thinwire.plan.gpu.links import collective_s
from thinwire.plan.gpu.priors import GIB, priors
from thinwire.plan.gpu.room import kept_passes, layer_activation_bytes, room
from thinwire.plan.gpu.step import Factors, bubble_part, columns, seconds, terms
from thinwire.plan.gpu.work import product_s
from thinwire.plan.pipeline import Pipelines, simulate
from thinwire.workload import Workload

A100 = priors().devices["a100-80gb"]
GPT = Job(
    layers=24,
    width=2048,
    heads=16,
    kv_heads=16,
    hidden=8192,
    gated=False,
    tied=True,
    vocabulary=50_304,
    sequence=2048,
    precision="fp16",
    device=A100,
    per_host=8,
    devices=8,
    intra_bytes_per_s=300e9,
    inter_bytes_per_s=25e9,
    data=8,
    micro_batch=4,
    global_batch=256,
    fused=False,
)
KORTHIKANTI = {
    "22B": {"layers": 48, "width": 6144, "heads": 64, "micro_batch": 4, "pipe": 1, "interleave": 1},
    "175B": {"layers": 96, "width": 12_288, "heads": 96, "micro_batch": 1, "pipe": 8, "interleave": 3},
    "530B": {"layers": 105, "width": 20_480, "heads": 128, "micro_batch": 1, "pipe": 35, "interleave": 3},
    "1T": {"layers": 128, "width": 25_600, "heads": 160, "micro_batch": 1, "pipe": 64, "interleave": 1},
}
MODES = {
    "none": {},
    "seq": {"sequence_parallel": True},
    "sel": {"recompute": "selective"},
    "seqsel": {"sequence_parallel": True, "recompute": "selective"},
    "full": {"recompute": "full"},
}


def activations(model: str, mode: str) -> float:
    """Of the first stage, in GiB."""
    shape = KORTHIKANTI[model]
    job = replace(GPT, **shape, **MODES[mode], data=1, tensor=8, hidden=4 * shape["width"], kv_heads=shape["heads"])
    job = replace(job, devices=8 * job.pipe, global_batch=shape["micro_batch"] * 1000)
    return kept_passes(job)[0] * layer_activation_bytes(job) / GIB


def figures() -> list[dict[str, str]]:
    path = Path(__file__).parent / "korthikanti_memory.csv"
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_activations_are_those_of_korthikanti() -> None:
    """Figure 1 to 2 % on the mean, and figure 7, relative to no recomputation."""
    errors = []
    for row in figures():
        if row["quantity"] == "param_opt":
            continue
        found = activations(row["model"], row["mode"])
        if row["quantity"] == "activations_rel":
            found *= 100 / activations(row["model"], "none")
        errors.append(abs(found / float(row["value"]) - 1))
    assert len(errors) == 24 and sum(errors) / len(errors) < 0.02


@pytest.mark.parametrize("name", ["124m", "8b", "70b", "175b"])
def test_parameters_and_flops_are_those_of_the_workload(name: str) -> None:
    """One model counts a model, here without norms and positions; the null model's flops are its too."""
    from thinwire.plan.measurements.score import flops

    shape = preset(name)
    workload = Workload.of_transformer(shape, 1, 1024)
    matrices = sum(one.numel for one in workload.parameters if len(one.shape) == 2 and "positions" not in one.name)
    fields = {key: getattr(shape, key) for key in ("layers", "width", "heads", "kv_heads", "hidden", "tied", "vocabulary")}
    job = replace(GPT, **fields, gated=shape.mlp == "swiglu", sequence=1024, global_batch=8)
    assert job.parameters == matrices
    assert flops(job) == pytest.approx(8 * 1024 * workload.flops_per_token)


@pytest.mark.parametrize("op", ["all_reduce", "all_gather"])
def test_a_ring_between_hosts_costs_what_the_cluster_says(op: str) -> None:
    """Bandwidth terms of both forms of one cost model, hosts of one device each."""
    job = replace(GPT, per_host=1, data=8)
    routes, ranks = Routes(equal_hosts(8, 8 * job.inter_bytes_per_s)), tuple(range(8))
    size = 1 << 30
    # what each rank hands over: all of it for an all-reduce, its part for an all-gather
    handed = [size, 2 * size] if op == "all_reduce" else [size // 8, size // 4]
    graph = price(routes, op, handed[1], ranks) - price(routes, op, handed[0], ranks)
    closed = [collective_s(job, "data", count * size, reduces=op == "all_reduce").inter for count in (1, 2)]
    assert (closed[1] - closed[0]) * priors().fabric.rdma_part == pytest.approx(graph / FRAME_OVERHEAD)


@pytest.mark.parametrize(("schedule", "per_rank"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 8), (4, 8), (4, 16)])
def test_bubbles_are_those_of_the_simulated_schedule(schedule: str, per_rank: int, ranks: int, micro_batches: int) -> None:
    """m t + beta (p - 1) t, wires idle, against the passes one by one; interleaved schedules know no better bound."""
    stages = ranks * per_rank
    taken = {(kind, stage): value / per_rank for stage in range(stages) for kind, value in {"F": 1.0, "B": 2.0}.items()}
    pipelines = Pipelines(
        orders=orders(schedule, ranks, per_rank, micro_batches),
        groups=[list(range(ranks))],
        seconds=taken,
        activation_bytes=[0] * (stages - 1),
        gradient_bytes=[0] * (stages - 1),
    )
    ran = simulate(pipelines, Routes(equal_hosts(ranks, 1e9))).seconds
    job = replace(GPT, pipe=ranks, interleave=per_rank, schedule=schedule)
    assert ran == pytest.approx(3 * (micro_batches + bubble_part(job.schedule, job.interleave) * (ranks - 1)), rel=0.01)


sizes = st.integers(1, 64).map(lambda count: 128 * count)


@given(sizes, sizes, sizes)
def test_no_product_beats_the_device(m: int, n: int, k: int) -> None:
    rate = A100.flops_per_s["fp16"]
    assert product_s(A100, "fp16", m, n, k) >= 2 * m * n * k / rate
    assert product_s(A100, "fp16", m, 2 * n, k) >= product_s(A100, "fp16", m, n, k)


def test_odd_widths_cost_more() -> None:
    even, odd = (product_s(A100, "fp16", 2048, 7200, width) for width in (1792, 1800))
    assert odd > 1.2 * even * 1800 / 1792


LAYOUTS = st.fixed_dictionaries(
    {"data": st.sampled_from([1, 2, 8]), "tensor": st.sampled_from([1, 2, 16]), "pipe": st.sampled_from([1, 3, 24])}
    | {"zero": st.integers(0, 3), "recompute": st.sampled_from(["none", "selective", "full"]), "fused": st.booleans()}
    | {"precision": st.sampled_from(["fp32", "fp16", "bf16", "fp8"]), "micro_batch": st.sampled_from([1, 3])}
)


@given(LAYOUTS)
def test_more_of_anything_is_never_slower_and_factors_only_scale(layout: dict) -> None:
    job = replace(GPT, **layout, devices=layout["data"] * layout["tensor"] * layout["pipe"])
    now = float(seconds(terms(job)))
    assert now > 0
    assert float(seconds(terms(replace(job, inter_bytes_per_s=50e9)))) <= now
    assert float(seconds(terms(replace(job, intra_bytes_per_s=600e9)))) <= now
    assert float(seconds(terms(replace(job, global_batch=512)))) > now
    twice = Factors(*(2.0 if name not in ("rest", "torch") else 1.0 for name in Factors._fields))
    assert now < float(seconds(terms(job), twice)) <= 2 * now * 1.001
    assert float(seconds(terms(job), Factors(rest=3.0))) == pytest.approx(3 * now)


@given(st.lists(LAYOUTS, min_size=2, max_size=5))
def test_many_steps_at_once_are_the_single_ones(layouts: list[dict]) -> None:
    rows = [terms(replace(GPT, **layout, devices=1)) for layout in layouts]
    assert list(seconds(columns(rows))) == pytest.approx([float(seconds(row)) for row in rows])


@given(LAYOUTS)
def test_sharding_and_recomputing_never_need_more_room(layout: dict) -> None:
    job = replace(GPT, **{**layout, "zero": 0, "pipe": 1}, devices=64)
    needs = [room(replace(job, zero=stage)).states for stage in (0, 1, 2)]
    assert needs == sorted(needs, reverse=True)
    kept = [layer_activation_bytes(replace(job, recompute=mode)) for mode in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)
    assert room(replace(job, micro_batch=8)).total > room(replace(job, micro_batch=4)).total


def test_states_in_mixed_precision_take_the_bytes_that_are_known() -> None:
    """16 to 20 bytes a parameter; 4 + 16 / d under ZeRO-1 (Rajbhandari et al. 2020)."""
    job = replace(GPT, data=4, devices=4)
    assert room(job).states == pytest.approx(20 * job.parameters)
    assert room(replace(job, zero=1)).states == pytest.approx((4 + 16 / 4) * job.parameters)
    assert room(
        replace(job, precision="bf16", wide_gradients=True, device=priors().devices["h100-80gb"])
    ).states == pytest.approx(18 * job.parameters)


def test_an_axis_leaves_the_host_when_its_ranks_do() -> None:
    job = replace(GPT, tensor=4, data=4, pipe=2, devices=32)
    assert job.place("tensor") == (1, 4) and job.place("data") == (2, 2) and job.place("pipe") == (2, 1)
    assert replace(job, tensor=16, data=2).place("tensor") == (2, 8)
