"""Servers and workers with parameters of every dtype, mixed in one model."""

from typing import Any

import pytest
import torch
from cases import long
from hypothesis import given
from hypothesis import strategies as st
from services import Running, serving, together, wait_for
from torch import nn

from thinwire import AsyncDiLoCo, ParameterServerWorker
from thinwire.collectives.ledger import difference
from thinwire.config.replicas import Code, DiLoCo, Gradients, ServerAdamW, Service
from thinwire.errors import UserError
from thinwire.sync.server.coding import coded_bytes, make_flat
from thinwire.sync.server.extent import Extent
from thinwire.sync.server.flat import FlatParameters, cut, extent_of, within

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
"""float64 first, so that a model's order is not that of the wire."""
EVERY, ROUNDS, RATE = 3, 3, 0.7
KINDS = ("none", "bf16", "fp16", "int8", "int4", "fp4", "sign", "ternary", "codebook2", "topk")


def net(seed: int = 0, only: torch.dtype | None = None) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    values = ((torch.randn(9, 12, dtype=dtype.to_complex().to_real(), generator=generator), dtype) for dtype in DTYPES)
    return nn.ParameterList([nn.Parameter(value.to(only or dtype)) for value, dtype in values])


def gradients(model: nn.Module, worker: int, step: int) -> None:
    """Of each value, which depends on it, worker and step, and on no other value."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() - torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [real(one).clone() for one in model.parameters()]


def near(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """To its own precision, or one rounding."""
    most = {torch.float64: 1e-12, torch.float32: 5e-6}
    return all(
        one.dtype == other.dtype
        and float((one.double() - other.double()).abs().max()) < most.get(one.dtype, 4 * torch.finfo(one.dtype).eps)
        for one, other in zip(found, wanted, strict=True)
    )


def replica(running: Running, number: int, rounds: int = ROUNDS, model: nn.Module | None = None) -> list[torch.Tensor]:
    """Asynchronous DiLoCo; what its model holds at the end."""
    model = net(number) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with AsyncDiLoCo(model, optimizer, every=EVERY, store=running.address, name=f"r{number}") as diloco:
        for step in range(diloco.first_step, rounds * EVERY):
            gradients(model, number, step)
            optimizer.step()
    return values(model)


def diloco(workers: int, **codes: Any) -> Service:
    merge = DiLoCo(every=EVERY, learning_rate=RATE, momentum=0.9, weighting="equal")
    return Service(first_workers=workers, merge=merge, heartbeat_s=0.1, **codes)


def reference(start: nn.Module, workers: int) -> list[torch.Tensor]:
    """DiLoCo in one process, anchors in float64."""
    anchors = [real(one).double() for one in start.parameters()]
    momenta = [torch.zeros_like(one) for one in anchors]
    models = [net() for _ in range(workers)]
    for round_ in range(ROUNDS):
        for model in models:
            for one, anchor in zip(model.parameters(), anchors, strict=True):
                real(one.data).copy_(anchor.float() if real(one).dtype != torch.float64 else anchor)
        begun = values(models[0])
        for number, model in enumerate(models):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(round_ * EVERY, (round_ + 1) * EVERY):
                gradients(model, number, step)
                optimizer.step()
        for index, (anchor, u) in enumerate(zip(anchors, momenta, strict=True)):
            delta = sum(begun[index].double() - values(model)[index].double() for model in models) / workers
            u.mul_(0.9).add_(delta)
            anchor.sub_(RATE * (delta + 0.9 * u))
    return [anchor.to(one.dtype) for anchor, one in zip(anchors, begun, strict=True)]


@pytest.mark.parametrize("servers", [1, long(3)])
def test_asynchronous_diloco_is_that_of_one_process(servers: int) -> None:
    """With a quorum of all; float64 to 12 digits, though shares are a third each."""
    with serving(diloco(3).model_copy(update={"servers": servers})) as running:
        ended = together(*(lambda number=number: replica(running, number) for number in range(3)))
        assert any(near(one, reference(net(number), 3)) for number, one in enumerate(ended))  # whoever came first began it
        assert all(torch.equal(one, first) for found in ended for one, first in zip(found, ended[0], strict=True))
        if servers == 1:
            assert running.weights().dtype == torch.float64
        assert not running.failures


@pytest.mark.parametrize(
    ("push", "pull"), [("int4", "int8"), ("topk", "none"), *(long(a, b) for a in KINDS for b in ("none", "int8"))]
)
def test_with_codes_replicas_end_alike_and_keep_what_is_lost_in_float64(push: str, pull: str) -> None:
    with serving(diloco(2, push=Code(kind=push), pull=Code(kind=pull))) as running:
        states: list[Any] = []

        def life(number: int) -> list[torch.Tensor]:
            model = net(number)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with AsyncDiLoCo(model, optimizer, every=EVERY, store=running.address, name=f"r{number}") as joined:
                for step in range(ROUNDS * EVERY):
                    gradients(model, number, step)
                    optimizer.step()
                states.append(joined.state_dict())
                joined.load_state_dict(joined.state_dict())
            return values(model)

        ended = together(lambda: life(0), lambda: life(1))
        assert all(torch.equal(one, other) for one, other in zip(*ended, strict=True))
        assert all(bool(torch.isfinite(one).all()) for one in ended[0])
        for state in states if push != "none" else ():
            assert {one.dtype for one in state["coder"]["owed"]["kept"].values()} == {torch.float64}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_pushed_gradients_are_steps_of_one_process(optimizer: str) -> None:
    chosen = {"optimizer": ServerAdamW(weight_decay=0.1)} if optimizer == "adamw" else {}
    service = Service(merge=Gradients(learning_rate=0.05, **chosen), heartbeat_s=0.1)
    with serving(service) as running:
        model = net()
        with ParameterServerWorker(model, store=running.address, name="a") as worker:
            for step in range(6):
                gradients(model, 0, step)
                worker.step()
    wide = [nn.Parameter(one.double() if one.dtype == torch.float64 else one.float()) for one in values(net())]
    alone = torch.optim.AdamW(wide, lr=0.05, betas=(0.9, 0.95), weight_decay=0.1) if chosen else torch.optim.SGD(wide, lr=0.05)
    stored = net()
    for step in range(6):
        for one, parameter in zip(stored.parameters(), wide, strict=True):
            real(one.data).copy_(parameter.detach())
        gradients(stored, 0, step)
        for one, parameter in zip(stored.parameters(), wide, strict=True):
            parameter.grad = real(one.grad).to(parameter.dtype)
        alone.step()
    for one, parameter in zip(stored.parameters(), wide, strict=True):
        real(one.data).copy_(parameter.detach())
    assert near(values(model), values(stored))


@pytest.mark.parametrize(("push", "pull"), [("none", "none"), ("int8", "none"), ("none", "int4")])
def test_the_ledger_of_every_dtype_is_what_was_predicted(push: str, pull: str) -> None:
    """float64 takes 8 bytes, everything else 4, and codes are of float32."""
    codes = {"push": Code(kind=push), "pull": Code(kind=pull)}
    with serving(Service(servers=3, merge=Gradients(learning_rate=0.1), heartbeat_s=60, **codes)) as running:
        model = net()
        with ParameterServerWorker(model, store=running.address, name="a") as worker:
            ledgers = [worker.client.ledger, *running.ledgers]
            before = [ledger.snapshot() for ledger in ledgers]
            for step in range(3):
                gradients(model, 0, step)
                worker.step()
            for ledger, old in zip(ledgers, before, strict=True):  # a server may enter its last one later
                wait_for(lambda: sum(t.calls for t in difference(ledger.snapshot(), old).values()) % 6 == 0)  # noqa: B023
            found = [difference(ledger.snapshot(), old) for ledger, old in zip(ledgers, before, strict=True)]
    flat = FlatParameters(net())
    extents = [extent_of(within(flat.spans(), part)) for part in cut(flat.values().numel(), 3)]
    assert sum(extent.wide for extent in extents) == 3 * 108 and sum(extent.numel for extent in extents) == 8 * 108
    assert extents[0].wide == 0
    up, down = ([coded_bytes(make_flat(code), extent) for extent in extents] for code in codes.values())
    assert {c.label: c.message_bytes for c in found[0] if "push" in c.label} == {f"push to server {i}": up[i] for i in range(3)}
    for index, snapshot in enumerate(found[1:]):
        assert {call.message_bytes for call in snapshot if "weights" in call.label} == {down[index]}
    if push == pull == "none":
        assert sum(up) == 4 * 5 * 108 + 8 * 3 * 108


def test_a_resumed_service_goes_on_as_the_uninterrupted_one() -> None:
    """A replica ends a life with a pull, so two lives make the same pushes as one."""
    service = diloco(1)
    with serving(service) as running:
        whole = replica(running, 0)
    with serving(service) as running:
        replica(running, 0, rounds=1)
        states = [server.merger.state_dict() for server in running.servers]
    with serving(service, state=states) as running:
        resumed = replica(running, 0)
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_a_model_in_16_bits_that_trains_nothing_moves_nothing() -> None:
    """Though it cannot hold the weights of the servers, which one in float32 has moved; it has as many values."""
    merge = DiLoCo(every=EVERY, learning_rate=RATE, momentum=0.0)
    with serving(diloco(1).model_copy(update={"merge": merge})) as running:
        replica(running, 0, model=net(only=torch.float32))
        before = running.weights().clone()
        assert not torch.equal(before.bfloat16().float(), before)
        model = net(seed=1, only=torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with AsyncDiLoCo(model, optimizer, every=EVERY, store=running.address, name="idle") as joined:
            for step in range(EVERY):
                gradients(model, 1, step)
                optimizer.step()
            assert joined.pushes == 1
        assert torch.equal(running.weights(), before)


def test_a_model_of_another_precision_is_refused_in_one_line() -> None:
    with serving(diloco(1)) as running:
        replica(running, 0, rounds=1)
        model = nn.ParameterList([nn.Parameter(torch.zeros(8 * 108))])
        other = AsyncDiLoCo(model, torch.optim.SGD(model.parameters()), store=running.address, name="b")
        with pytest.raises(UserError, match=r"holds 864 weights \(324 in float64\) where this model has 864 weights;"):
            other.__enter__()


@given(st.integers(1, 50), st.data())
def test_what_is_packed_is_unpacked(numel: int, data: st.DataObject) -> None:
    extent = Extent(numel, data.draw(st.integers(0, numel)))
    given_ = torch.randn(numel, dtype=torch.float64)
    packed = extent.pack(given_)
    found = extent.unpack(packed)
    border = numel - extent.wide
    assert packed.numel() == extent.exact_bytes and found.dtype == extent.dtype
    assert torch.equal(found[border:].double(), given_[border:])
    assert torch.equal(found[:border].float(), given_[:border].float())
