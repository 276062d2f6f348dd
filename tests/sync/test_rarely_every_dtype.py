"""Replicas that go alone with parameters of every dtype, mixed in one model."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import long
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import thinwire
from pool import Pool, Rank
from thinwire.sync.local_steps import due
from thinwire.workload import Workload

STEPS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
OPTIONS: dict[str, dict[str, Any]] = {
    "diloco": {"every": 3, "outer_learning_rate": 0.7},
    "streaming": {"kind": "streaming", "every": 3, "layers_per_fragment": 1, "overlap": 2, "mixing": 0.5},
    "added": {"kind": "streaming", "every": 3, "layers_per_fragment": 1, "overlap": 2, "arrival": "add"},
    "sparseloco": {"kind": "sparseloco", "every": 3},
    "muloco": {"kind": "muloco", "every": 3},
    "local_sgd": {"kind": "local_sgd", "every": 3},
    "noloco": {"kind": "noloco", "every": 3},
}
CODES = ("none", "bf16", "fp16", "int8", "int4", "fp4", "sign", "ternary", "topk", "topk_global", "randomk", "powersgd", "demo")
PAIRS = ("none", "bf16", "fp16")
"""What noloco sends."""


class Block(nn.Module):
    """A matrix and a vector of each dtype."""

    def __init__(self) -> None:
        super().__init__()
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            self.register_parameter(f"matrix_{name}", nn.Parameter((0.1 * torch.randn(48, 64)).to(dtype)))
            self.register_parameter(f"vector_{name}", nn.Parameter((0.1 * torch.randn(10)).to(dtype)))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    model.last = nn.Parameter(torch.randn(7, dtype=torch.complex128))
    return model


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, replica: int, steps: range) -> None:
    """Each value towards one that depends on replica and step, and on no other value."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * replica + step)
        for parameter in model.parameters():
            parameter.grad = parameter.detach() - torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def sent(outer: thinwire.DiLoCo) -> dict[tuple[str, int], int]:
    """How often each row was sent in steps."""
    rows = {call: total.calls for call, total in outer.ledger.snapshot().items() if total.last_step >= 0 and call.op != "recv"}
    return {(call.label, call.message_bytes): calls for call, calls in rows.items() if not call.label.startswith("final")}


def loop(context: Rank, options: dict, cut: int | None = None) -> dict[str, Any]:
    """All steps, perhaps in two lives. Each replica begins with parameters of its own; the first one's must win."""
    model = net(seed=context.rank)
    optimizer = sgd(model)
    with thinwire.DiLoCo(model, optimizer, **options) as outer:
        train(model, optimizer, context.rank, range(cut or STEPS))
        saved = {"outer": outer.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved, file := io.BytesIO())
        with outer.averaged():
            averaged = values(model)
        back = same(values(model), saved["model"])
    if cut:
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model = net(seed=9)
        optimizer = sgd(model)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        outer = thinwire.DiLoCo(model, optimizer, **options)
        outer.load_state_dict(saved["outer"])
        with outer:
            train(model, optimizer, context.rank, range(cut, STEPS))
    workload = Workload.of_parameters([(name, tuple(one.shape)) for name, one in model.named_parameters()], 4)
    return {
        "final": values(model),
        "averaged": averaged,
        "back": back,
        "state": saved["outer"]["sync"],
        "sent": sent(outer),
        "predicted": [(one.event, one.label, one.message_bytes) for one in outer.traffic(workload)],
    }


def calls(predicted: list[tuple[str, str, int]]) -> dict[tuple[str, int], int]:
    """How often each row is sent in STEPS steps."""
    events = sorted({event for event, _, _ in predicted})
    return {
        (label, size): sum(due(events.index(event), len(events), 3, done) for done in range(1, STEPS + 1))
        for event, label, size in predicted
    }


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        *[("diloco", "none"), ("diloco", "int4"), ("streaming", "none"), ("streaming", "topk"), ("sparseloco", None)],
        *[("muloco", "int8"), ("local_sgd", "bf16"), ("local_sgd", "powersgd"), ("noloco", "none"), ("noloco", "bf16")],
        *(long(kind, code) for kind in OPTIONS for code in (PAIRS if kind == "noloco" else CODES)),
    ],
)
def test_replicas_are_one_model_and_send_what_was_predicted(ranks2: Pool, kind: str, code: str | None) -> None:
    options = OPTIONS[kind] | ({} if code is None else {"compress": code})
    results = ranks2.run(loop, options)
    for one in results:
        assert same(one["final"], results[0]["final"]) and one["back"]
        assert all(bool(torch.isfinite(torch.view_as_real(v) if v.is_complex() else v).all()) for v in one["final"].values())
        assert one["sent"] == calls(one["predicted"])
        kept = one["state"]["slow"] if kind == "noloco" else [fragment["anchor"] for fragment in one["state"]["fragments"]]
        assert {anchor.dtype for anchor in kept} == {torch.float32, torch.float64}
    if kind != "noloco":
        assert same(results[0]["averaged"], results[1]["averaged"])


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        *[("diloco", "int4"), ("streaming", "none"), ("streaming", "int4"), ("noloco", "bf16")],
        *(long(kind, code) for kind in OPTIONS for code in (PAIRS if kind == "noloco" else CODES)),
    ],
)
def test_a_second_life_equals_one_bit_for_bit(ranks2: Pool, kind: str, code: str) -> None:
    """Streaming has a fragment under way after 5 steps."""
    options = OPTIONS[kind] | {"compress": code}
    whole, resumed = ranks2.run(loop, options), ranks2.run(loop, options, 5)
    assert all(same(one["final"], other["final"]) for one, other in zip(whole, resumed, strict=True))


def real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in which a replica's anchor is kept."""
    return real(tensor.detach()).to(torch.float64 if real(tensor).dtype == torch.float64 else torch.float32, copy=True)


def reference(replicas: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """DiLoCo in one process: (anchors, the model)."""
    models = [net() for _ in range(replicas)]
    optimizers = [sgd(model) for model in models]
    anchors = [wide(one) for one in models[0].parameters()]
    momenta = [torch.zeros_like(one) for one in anchors]
    for step in range(STEPS):
        for replica, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            train(model, optimizer, replica, range(step, step + 1))
        if (step + 1) % 3 and step != STEPS - 1:
            continue
        for anchor, u, held in zip(anchors, momenta, zip(*(model.parameters() for model in models), strict=True), strict=True):
            begun = anchor.to(real(held[0]).dtype).to(anchor.dtype)
            delta = sum(begun - wide(one) for one in held) / replicas
            u.mul_(0.9).add_(delta)
            anchor.sub_(0.7 * (delta + 0.9 * u))
            for one in held:
                real(one.data).copy_(anchor)
    return anchors, [one.detach() for one in models[0].parameters()]


def test_equals_the_reference_in_one_process(ranks3: Pool) -> None:
    """float64 to its own precision, anchors in float32 to theirs, and stored results to one rounding."""
    results = ranks3.run(loop, OPTIONS["diloco"])
    _, expected = reference(3)
    for found, wanted in zip(results[0]["final"].values(), expected, strict=True):
        found, wanted = real(found), real(wanted)
        most = {torch.float64: 1e-12, torch.float32: 5e-6}.get(found.dtype, 2 * torch.finfo(found.dtype).eps)
        assert found.dtype == wanted.dtype
        assert float((found.double() - wanted.double()).abs().max()) < most * max(1.0, float(wanted.abs().max()))


def idle(context: Rank, options: dict) -> bool:
    """Whether anchors with digits that no model of 16 bits holds stay what they are while nothing is trained."""
    model = net()
    optimizer = sgd(model, rate=0.0)
    outer = thinwire.DiLoCo(model, optimizer, **options)
    with outer:
        pass
    state = outer.state_dict()
    for kept in [state["sync"]] if "slow" in state["sync"] else state["sync"]["fragments"]:
        for anchor in kept["slow"] if "slow" in kept else [kept["anchor"]]:
            anchor.mul_(1 + 2**-12)  # less than half of the last place in bfloat16, and on the way to float16's
    outer = thinwire.DiLoCo(model, optimizer, **options)
    outer.adopt([state] * context.world_size)
    with outer:
        before, begun = outer.state_dict()["sync"], values(model)
        train(model, optimizer, context.rank, range(STEPS))
        after, ended = outer.state_dict()["sync"], values(model)
    if "slow" in before:
        alike = [torch.equal(one, other) for one, other in zip(before["slow"], after["slow"], strict=True)]
    else:
        pairs = zip(before["fragments"], after["fragments"], strict=True)
        alike = [torch.equal(one["anchor"], other["anchor"]) for one, other in pairs]
    return all(alike) and len(alike) >= 2 and same(begun, ended)


@pytest.mark.parametrize("kind", ["diloco", "local_sgd", "noloco", "streaming", "added"])
def test_nothing_moves_where_nothing_was_trained(ranks2: Pool, kind: str) -> None:
    assert all(ranks2.run(idle, OPTIONS[kind]))


class Layers(nn.Module):
    """One of each dtype that FSDP2 shards."""

    def __init__(self) -> None:
        super().__init__()
        dtypes = (torch.float32, torch.bfloat16, torch.float64)
        self.layers = nn.ModuleList(nn.Linear(24, 24).to(dtype) for dtype in dtypes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).tanh()
        return x


def sharded(context: Rank, options: dict) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Layers()
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "shard"))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    optimizer = sgd(model)
    with thinwire.DiLoCo(model, optimizer, group=mesh["outer"], **options) as outer:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(100 * context.rank + step)
            (model(torch.randn(4, 24, generator=generator)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    workload = Workload.of_parameters([(name, tuple(one.shape)) for name, one in whole.named_parameters()], 4)
    final = {name: one.full_tensor().detach() for name, one in model.named_parameters()}
    digest = torch.cat([one.contiguous().view(torch.uint8).flatten() for one in final.values()])
    everyone = [torch.empty_like(digest) for _ in range(4)]
    dist.all_gather(everyone, digest)
    return {
        "equal": all(torch.equal(one, digest) for one in everyone),
        "dtypes": [one.dtype for one in final.values()],
        "sent": sent(outer),
        "predicted": [(one.event, one.label, one.message_bytes) for one in outer.traffic(workload)],
    }


@pytest.mark.parametrize(("kind", "code"), [("diloco", "int4"), ("streaming", "none"), ("noloco", "bf16")])
def test_shards_of_every_dtype(ranks4: Pool, kind: str, code: str) -> None:
    for one in ranks4.run(sharded, OPTIONS[kind] | {"compress": code}):
        assert one["equal"] and set(one["dtypes"]) == {torch.float32, torch.bfloat16, torch.float64}
        assert one["sent"] == calls(one["predicted"])
