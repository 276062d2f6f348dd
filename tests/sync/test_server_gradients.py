"""Parameter servers: the laws of their consistency, their bytes, and what a worker's end does to the others."""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from services import serving, together, wait_for
from torch import nn

from thinwire import AsyncDiLoCo, ParameterServerWorker
from thinwire.collectives.ledger import difference
from thinwire.config.replicas import Code, Gradients, ServerAdamW, ServerSGD, Service
from thinwire.errors import UserError
from thinwire.sync.server.coding import coded_bytes, make_flat
from thinwire.sync.server.extent import Extent
from thinwire.sync.server.flat import Span, cut, within
from thinwire.sync.server.message import HEAD_BYTES

STEPS, WORKERS, ROWS = 6, 3, 4


def make_model() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return model


def rows(step: int, worker: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + worker)
    inputs = torch.randn(ROWS, 5, generator=generator)
    return inputs, (inputs[:, :1] * inputs[:, 1:2]).sin()


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


NUMEL = flat(make_model()).numel()


def one_process(optimizer_of) -> torch.Tensor:
    """All workers' rows of a step in one batch."""
    model = make_model()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        batches = [rows(step, worker) for worker in range(WORKERS)]
        optimizer.zero_grad()
        loss_of(model, tuple(map(torch.cat, zip(*batches, strict=True)))).backward()
        optimizer.step()
    return flat(model)


def train(address: str, worker: int, steps: int = STEPS, before: Callable[[int], object] = bool) -> torch.Tensor:
    """before: what happens ahead of each step; it is given the number."""
    model = make_model()
    with ParameterServerWorker(model, store=address, name=f"w{worker}") as server:
        for step in range(server.first_step, steps):
            before(step)
            loss_of(model, rows(step, worker)).backward()
            server.step(samples=ROWS)
    return flat(model)


def sequential(**changes) -> Service:
    return Service(first_workers=WORKERS, merge=Gradients(delay=0, learning_rate=0.2, **changes), heartbeat_s=0.1)


@given(st.integers(1, 5000), st.integers(1, 40), st.data())
def test_ranges_cover_every_value_once(numel: int, servers: int, data: st.DataObject) -> None:
    if servers > numel:
        with pytest.raises(UserError, match=f"{servers} servers for {numel}"):
            cut(numel, servers)
        return
    ranges = cut(numel, servers)
    assert [value for part in ranges for value in part] == list(range(numel))
    assert max(len(part) for part in ranges) - min(len(part) for part in ranges) <= 1
    edges = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=6))})
    spans = [Span(a, b, index % 2 == 0) for index, (a, b) in enumerate(pairwise(edges))]
    found = [(part.start + s.first, part.start + s.end, s.decays) for part in ranges for s in within(spans, part)]
    assert [(v, d) for a, b, d in found for v in range(a, b)] == [(v, s.decays) for s in spans for v in range(s.first, s.end)]


@pytest.mark.parametrize("servers", [1, 3])
def test_sequential_sgd_is_one_process_on_the_concatenated_batch(servers) -> None:
    expected = one_process(lambda model: torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5))
    service = sequential(optimizer=ServerSGD(momentum=0.5)).model_copy(update={"servers": servers})
    with serving(service) as running:
        found = together(*(partial(train, running.address, worker) for worker in range(WORKERS)))
        assert [server.merger.version for server in running.servers] == [STEPS] * servers
        torch.testing.assert_close(running.weights(), expected, rtol=0, atol=1e-6)
    for weights in found:  # what each worker goes home with
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_the_servers_adamw_decays_matrices_only() -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.2, betas=(0.9, 0.95))

    expected = one_process(optimizer_of)
    with serving(sequential(optimizer=ServerAdamW(weight_decay=0.3)).model_copy(update={"servers": 2})) as running:
        together(*(partial(train, running.address, worker) for worker in range(WORKERS)))
        torch.testing.assert_close(running.weights(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("delay", [0, 2])
def test_no_worker_is_more_than_the_delay_ahead(delay) -> None:
    service = Service(first_workers=2, merge=Gradients(delay=delay, learning_rate=0.1), heartbeat_s=0.1)
    done: dict[int, int] = {0: 0, 1: 0}
    ahead = []

    def work(address: str, worker: int, pause_s: float) -> None:
        model = make_model()
        with ParameterServerWorker(model, store=address, name=f"w{worker}") as server:
            for step in range(8):
                ahead.append(step - min(done.values()))
                loss_of(model, rows(step, worker)).backward()
                time.sleep(pause_s)
                server.step()
                done[worker] = step + 1

    with serving(service) as running:
        together(partial(work, running.address, 0, 0.0), partial(work, running.address, 1, 0.05))
        assert running.servers[0].merger.furthest_ahead == delay
    assert max(ahead) <= delay + 1  # the slow one may have been answered and not have noted it yet
    assert max(ahead) >= delay


def test_eventual_waits_for_nobody_and_learns() -> None:
    service = Service(first_workers=2, merge=Gradients(delay=-1, learning_rate=0.2), heartbeat_s=0.1)
    with serving(service) as running:
        merger = running.servers[0].merger
        slow = partial(train, running.address, 1, 3, lambda step: wait_for(lambda: merger.version >= 12 + step))
        together(partial(train, running.address, 0, 30), slow)
        assert merger.furthest_ahead >= 10 and merger.version == 33
        assert held_out(running.weights()) < 0.8 * held_out(flat(make_model()))


def held_out(weights: torch.Tensor) -> float:
    model, first = make_model(), 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(weights[first : first + parameter.numel()].view_as(parameter))
            first += parameter.numel()
        return float(sum(loss_of(model, rows(1000 + index, 0)) for index in range(50))) / 50


@pytest.mark.parametrize("kinds", [("none", "none"), ("int8", "none"), ("int4", "int8"), ("topk", "int8")])
def test_the_ledger_is_what_was_predicted(kinds) -> None:
    push, pull = (Code(kind=kind) for kind in kinds)
    service = Service(servers=3, merge=Gradients(learning_rate=0.1), push=push, pull=pull, heartbeat_s=0.1)
    with serving(service) as running:
        model = make_model()
        with ParameterServerWorker(model, store=running.address, name="a") as worker:
            ledgers = [worker.client.ledger, *running.ledgers]
            before = [ledger.snapshot() for ledger in ledgers]
            for step in range(4):
                loss_of(model, rows(step, 0)).backward()
                worker.step()
            sent = [6, 2, 2, 2]  # a head and a payload to each server, and from each
            for ledger, old, kinds_of_call in zip(ledgers, before, sent, strict=True):  # a server may enter its last one later
                wait_for(lambda: sum(t.calls for t in difference(ledger.snapshot(), old).values()) >= 4 * kinds_of_call)  # noqa: B023
            found = [difference(ledger.snapshot(), old) for ledger, old in zip(ledgers, before, strict=True)]
    sizes = [len(part) for part in cut(NUMEL, 3)]
    up, down = ([coded_bytes(make_flat(code), Extent(size)) for size in sizes] for code in (push, pull))
    predicted = [
        {f"{label} to server {i}": size for i in range(3) for label, size in (("head", HEAD_BYTES), ("push", up[i]))},
        *({"head to worker a": HEAD_BYTES, "weights to worker a": down[i]} for i in range(3)),
    ]
    for snapshot, wanted in zip(found, predicted, strict=True):
        assert not [call for call in snapshot if call.label.startswith("progress") and call.message_bytes != HEAD_BYTES]
        ours = {call: total for call, total in snapshot.items() if not call.label.startswith("progress to server ")}
        assert {(c.label, c.axis, c.op, c.message_bytes): (t.calls, t.wire_bytes) for c, t in ours.items()} == {
            (label, "replica", "send", size): (4, 4 * size) for label, size in wanted.items()
        }
    received = sum(server.received_bytes["a"] for server in running.servers)
    assert received == ledgers[0].sent_bytes


def test_codes_are_smaller_and_with_feedback_learn_as_float32_does() -> None:
    start, losses = held_out(flat(make_model())), {}
    for kind, pull in (("none", "none"), ("int8", "none"), ("int4", "int8")):
        service = Service(merge=Gradients(learning_rate=0.3), push=Code(kind=kind), pull=Code(kind=pull), heartbeat_s=0.1)
        with serving(service) as running:
            train(running.address, 0, 40)
            losses[kind] = held_out(running.weights())
    assert losses["none"] < 0.8 * start
    assert losses["int8"] == pytest.approx(losses["none"], rel=0.02)
    assert losses["int4"] == pytest.approx(losses["none"], rel=0.1)
    assert [coded_bytes(make_flat(Code(kind=kind)), Extent(1024)) for kind in ("none", "int8", "int4")] == [4096, 1032, 528]


def test_a_worker_that_breaks_off_is_not_waited_for_and_may_come_back() -> None:
    service = sequential().model_copy(update={"first_workers": 2})

    def break_off(address: str) -> None:
        model = make_model()
        with pytest.raises(RuntimeError), ParameterServerWorker(model, store=address, name="w1") as server:
            for step in range(2):
                loss_of(model, rows(step, 1)).backward()
                server.step(samples=ROWS)
            raise RuntimeError("the user's own")
        wait_for(lambda: running.servers[0].merger.version >= 5)
        with ParameterServerWorker(make_model(), store=address, name="w1") as server:
            assert server.first_step > 2  # it begins where the others are
        return server.first_step

    def is_back() -> bool:
        return any((event.worker, event.incarnation) == ("w1", 2) for event in running.servers[0].events)

    with serving(service) as running:
        stays = partial(train, running.address, 0, 30, lambda step: step != 20 or wait_for(is_back))
        together(stays, partial(break_off, running.address))
        assert running.servers[0].merger.version == 30
        events = [(event.what, event.worker, event.incarnation) for event in running.servers[0].events]
    assert ("lost", "w1", 1) in events and ("joined", "w1", 2) in events and ("left", "w0", 1) in events


def test_a_resumed_server_goes_on_as_the_uninterrupted_one(tmp_path) -> None:
    from thinwire.sync.server.snapshots import load, save

    service = sequential(optimizer=ServerSGD(momentum=0.9)).model_copy(update={"push": Code(kind="int4")})
    service = service.model_copy(update={"first_workers": 1})

    def steps(address: str, until: int, state: dict | None) -> dict:
        model = make_model()
        worker = ParameterServerWorker(model, store=address, name="a")
        if state:
            worker.load_state_dict(state)
        with worker:
            for step in range(worker.first_step, until):
                loss_of(model, rows(step, 0)).backward()
                worker.step()
        return worker.state_dict()

    with serving(service) as running:
        steps(running.address, STEPS, None)
        expected = running.weights()
    with serving(service, keep=tmp_path, every=100) as running:
        kept = steps(running.address, 3, None)
    save(kept, tmp_path / "worker.pt")
    with serving(service, [load(tmp_path / "server-0.pt")]) as running:
        steps(running.address, STEPS, load(tmp_path / "worker.pt"))
        assert torch.equal(running.weights(), expected)


def test_what_is_wrong_is_told_in_one_line() -> None:
    with serving(Service(push=Code(kind="int8"), merge=Gradients())) as running:
        model = make_model()
        not_finite = pytest.raises(UserError, match=r"gradient of 2\.weight is not finite")
        with not_finite, ParameterServerWorker(model, store=running.address, name="a") as worker:
            loss_of(model, rows(0, 0)).backward()
            model[2].weight.grad[0, 0] = float("nan")
            worker.step()
        with pytest.raises(UserError, match="a/b"):
            ParameterServerWorker(make_model(), store=running.address, name="a/b").__enter__()
        with pytest.raises(UserError, match=r"0\.weight is float8_e5m2; servers take float32, bfloat16"):
            ParameterServerWorker(make_model().to(torch.float8_e5m2), store=running.address, name="c")
        with ParameterServerWorker(make_model(), store=running.address, name="d"):
            other = ParameterServerWorker(nn.Linear(3, 3), store=running.address, name="e")
            with pytest.raises(UserError, match=f"holds {NUMEL} weights where this model has 12"):
                other.__enter__()
        with pytest.raises(UserError, match="want gradients"):
            AsyncDiLoCo(model, torch.optim.SGD(model.parameters()), store=running.address, name="f")
