"""Horovod's optimizer and what goes with it, on real ranks: equal to one process with all batches, by every way of travelling."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_horovod_ops import _ended  # noqa: F401 - a fixture
from torch import nn

import thinwire.horovod.torch as hvd
from pool import Pool, Rank

STEPS = 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unnamed": {"named_parameters": None},
    "sum": {"op": hvd.Sum},
    "two passes": {"backward_passes_per_step": 2},
    "predivided": {"gradient_predivide_factor": 4.0},
    "groups": {"groups": 2},
    "num_groups": {"num_groups": 3, "compression": hvd.Compression.none},
}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * rank + step), dtype=torch.float64)


def loss_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return (model(inputs) - 1).square().mean()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().reshape(-1) for one in model.parameters()])


def trained(context: Rank, options: dict[str, Any]) -> torch.Tensor:
    hvd.init()
    model = net(seed=context.rank)
    hvd.broadcast_parameters(model.named_parameters(), root_rank=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, **{"named_parameters": model.named_parameters(), **options})
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.9
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(STEPS):
        for micro in range(options.get("backward_passes_per_step", 1)):
            loss_of(model, batch(context.rank, 10 * step + micro)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return flat(model)


def reference(ranks: int, options: dict[str, Any]) -> torch.Tensor:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(STEPS):
        numbers = [10 * step + micro for micro in range(options.get("backward_passes_per_step", 1))]
        total = sum(loss_of(model, batch(rank, number)) for rank in range(ranks) for number in numbers)
        (total if options.get("op") is hvd.Sum else total / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return flat(model)


def coded(context: Rank, name: str, options: dict[str, Any]) -> tuple[bytes, float, int]:
    """The model's bits, its loss on all batches, and what the gradients took."""
    hvd.init()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 16))
    code = getattr(hvd.Compression, name)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.2), model.named_parameters(), code(**options) if options else code
    )
    data = torch.randn(32, 64, generator=torch.Generator().manual_seed(context.rank))
    for _ in range(30):
        loss_of(model, data).backward()
        optimizer.step()
        optimizer.zero_grad()
    sent = sum(total.wire_bytes for call, total in context.recorded().items() if call.label.startswith("allreduce"))
    return flat(model).numpy().tobytes(), float(hvd.allreduce(loss_of(model, data).detach())), sent


def ways_of_stepping(context: Rank) -> None:
    hvd.init()
    model = net()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    loss_of(model, batch(context.rank, 0)).backward()
    with pytest.raises(AssertionError, match="zero_grad"):
        optimizer.zero_grad()
    with pytest.raises(AssertionError, match="backward_passes_per_step"):
        loss_of(model, batch(context.rank, 0)).backward()
    optimizer.synchronize()
    optimizer.zero_grad()  # the pass that was refused has added to gradients that were on their way
    loss_of(model, batch(context.rank, 0)).backward()
    optimizer.synchronize()
    gradients = [one.grad.clone() for one in model.parameters()]
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped, before = [one.grad.clone() for one in model.parameters()], flat(model)
    with optimizer.skip_synchronize():
        optimizer.step()
    assert torch.allclose(before - flat(model), 0.1 * torch.cat([one.reshape(-1) for one in clipped]), rtol=0, atol=1e-12)
    everyone = hvd.allgather(torch.cat([one.reshape(-1) for one in gradients])[None])
    assert all(torch.equal(one, everyone[0]) for one in everyone)
    optimizer.zero_grad()
    loss_of(model, batch(context.rank, 1)).backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="skip_synchronize"):
        optimizer.step()
    optimizer.set_backward_passes_per_step(2)
    optimizer.zero_grad()
    for number in range(2):
        loss_of(model, batch(context.rank, number)).backward()
    optimizer.step()
    assert len({one.numpy().tobytes() for one in hvd.allgather(flat(model)[None])}) == 1
    lbfgs = hvd.DistributedOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), model.named_parameters())

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        loss = loss_of(model, batch(context.rank, 7))
        loss.backward()
        return hvd.allreduce(loss.detach(), name="loss")

    optimizer = None  # its hooks end with it
    lbfgs.step(closure)
    assert len({one.numpy().tobytes() for one in hvd.allgather(flat(model)[None])}) == 1


def unequal_use(context: Rank) -> None:
    """Parameters that one rank's backward pass does not reach, embeddings with sparse gradients, and a frozen one."""
    hvd.init()
    torch.manual_seed(0)
    for as_dense in (False, True):
        embedding, left, right = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 2), nn.Linear(3, 2)
        model = nn.ModuleList([embedding, left, right])
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        left.bias.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), sparse_as_dense=as_dense)
        optimizer.zero_grad()
        start = copy.deepcopy(model.state_dict())
        rows = embedding(torch.tensor([context.rank, 5]))
        (left if context.rank else right)(rows.detach()).sum().backward()
        rows.sum().backward()
        optimizer.step()
        assert torch.equal(left.bias, start["1.bias"]) and embedding.weight.grad.is_sparse
        assert torch.allclose(start["1.weight"] - left.weight, right_side(start, context, 1) / 2)
        moved = (start["0.weight"] - embedding.weight).sum(1)
        assert torch.allclose(moved, torch.tensor([1.5, 1.5, 0, 0, 0, 3, 0, 0, 0, 0]))
        assert len({one.numpy().tobytes() for one in hvd.allgather(flat(model)[None])}) == 1


def right_side(start: dict[str, torch.Tensor], context: Rank, rank: int) -> torch.Tensor:
    return start["0.weight"][[rank, 5]].sum(0).expand(2, 3)


def adasum_steps(context: Rank) -> None:
    hvd.init()
    model = net()
    start, alone = flat(model), net()
    step = torch.optim.Adam(alone.parameters(), lr=0.01)
    loss_of(alone, batch(context.rank, 0)).backward()
    step.step()
    own = [(new - old).detach() for new, old in zip(alone.parameters(), model.parameters(), strict=True)]
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), model.named_parameters(), op=hvd.Adasum)
    loss_of(model, batch(context.rank, 0)).backward()
    optimizer.step()
    wanted = torch.cat([hvd.allreduce(one, op=hvd.Adasum).reshape(-1) for one in own])
    torch.testing.assert_close(flat(model) - start, wanted, rtol=0, atol=1e-12)


def states(context: Rank) -> None:
    """Of every optimizer of torch, however far each rank is."""
    hvd.init()
    made: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1 + context.rank, momentum=0.9),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8 + context.rank / 100, 0.9), amsgrad=True),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
        "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    }
    for make in made.values():
        model = net(seed=context.rank)
        optimizer = make(model.parameters())
        for _ in range(2 if context.rank == 0 else 0):
            loss_of(model, batch(0, 0)).backward()
            optimizer.step()
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        everyone = hvd.allgather_object((model.state_dict(), optimizer.state_dict()))
        torch.testing.assert_close(everyone[1], everyone[0], rtol=0, atol=0)
        assert len(optimizer.state) == 6
    with pytest.raises(ValueError, match="LBFGS"):
        hvd.broadcast_optimizer_state(torch.optim.LBFGS(model.parameters()), root_rank=0)


def refusals(context: Rank) -> None:
    hvd.init()
    model, other = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options in (
        {"named_parameters": [*model.named_parameters(), *other.named_parameters()]},
        {"named_parameters": list(model.named_parameters())[:1]},
        {"named_parameters": list(model.parameters())},
        {"gradient_predivide_factor": 2.0, "op": hvd.Sum},
        {"groups": [[model[0].weight], [model[0].weight]]},
        {"groups": -1},
    ):
        with pytest.raises(ValueError):
            hvd.DistributedOptimizer(optimizer, **options)
    with pytest.raises(NotImplementedError):
        hvd.DistributedOptimizer(optimizer, op=hvd.Adasum, groups=2)
    with pytest.raises(ValueError):
        hvd.broadcast_parameters(torch.ones(1), root_rank=0)


def in_a_process_set(context: Rank) -> bool:
    """Ranks outside step alone."""
    hvd.init()
    pair = hvd.add_process_set([0, 2])
    model = net()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), process_set=pair)
    loss_of(model, batch(context.rank, 0)).backward()
    optimizer.step()
    models = hvd.allgather(flat(model)[None])
    return torch.equal(models[0], models[2]) and not torch.equal(models[0], models[1])


def batch_norms(context: Rank) -> None:
    """As BatchNorm of all ranks' batches, which differ in size; gradients and running statistics too."""
    hvd.init()
    torch.manual_seed(0)
    parts = [torch.randn(2 + rank, 4, 3, dtype=torch.float64) + rank for rank in range(hvd.size())]
    whole, own = torch.cat(parts).requires_grad_(), parts[context.rank].clone().requires_grad_()
    plain, ours = nn.BatchNorm1d(4).double(), hvd.SyncBatchNorm(4).double()
    for _ in range(2):
        wanted, found = plain(whole), ours(own)
    first = sum(map(len, parts[: context.rank]))
    torch.testing.assert_close(found, wanted[first : first + len(own)], rtol=0, atol=1e-9)
    wanted.square().sin().sum().backward()
    found.square().sin().sum().backward()
    torch.testing.assert_close(own.grad, whole.grad[first : first + len(own)], rtol=0, atol=1e-9)
    for name in ("weight", "bias"):
        total = hvd.allreduce(getattr(ours, name).grad, op=hvd.Sum)
        torch.testing.assert_close(total, getattr(plain, name).grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=1e-9)
    ours.eval()
    plain.eval()
    torch.testing.assert_close(ours(own), plain(own), rtol=0, atol=1e-9)
    with pytest.raises(ValueError):
        ours(torch.ones(3))


def goes_on(context: Rank) -> tuple[list[int], torch.Tensor]:
    """A collective fails in epoch 2 of 4, once; every rank goes back to the commit before it. Then one fails for ever."""
    hvd.init()
    model = net(seed=context.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[int] = []
    resets: list[int] = []

    @hvd.elastic.run
    def train(state: Any) -> None:
        while state.epoch < 4:
            seen.append(state.epoch)
            with torch.no_grad():
                for one in model.parameters():
                    one += hvd.allreduce(torch.ones_like(one))
            if len(seen) == 3:
                hvd.allreduce(torch.ones(1 + context.rank), name="fails")
            state.epoch += 1
            state.commit()

    state = hvd.elastic.TorchState(model, optimizer, epoch=0)
    state.register_reset_callbacks([lambda: resets.append(1)])
    train(state)
    state.epoch, begun = 0, list(seen)

    @hvd.elastic.run
    def never(state: Any) -> None:
        hvd.allreduce(torch.ones(1 + context.rank), name="fails")

    with pytest.raises(hvd.HorovodInternalError, match="fails"):
        never(state)
    assert len(resets) == 2
    return begun, flat(model) - flat(net())


def samplers(context: Rank) -> None:
    hvd.init()
    sampler = hvd.elastic.ElasticSampler(range(20), shuffle=True)
    state = hvd.elastic.TorchState(sampler=sampler)
    state.sync()
    everyone = hvd.allgather(torch.tensor(list(sampler)))
    assert sorted(everyone.tolist()) == list(range(20)) != everyone.tolist()
    sampler.record_batch(0, 2)
    state.commit()
    sampler.record_batch(1, 2)
    state.restore()
    assert sampler.processed_num == 2
    state.sync()
    done, left = sampler.processed_indices, hvd.allgather(torch.tensor(list(sampler))).tolist()
    assert len(done) == 4 and sorted({*done, *left}) == list(range(20)) and len(left) == 16
    sampler.set_epoch(1)
    assert len(sampler) == 10


@pytest.mark.door("plain averaging", "horovod.torch")
@pytest.mark.parametrize("name", OPTIONS)
def test_training_equals_one_process_with_all_batches(ranks2: Pool, name: str) -> None:
    found = ranks2.run(trained, OPTIONS[name])
    wanted = reference(2, OPTIONS[name])
    for one in found:
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-9)


@pytest.mark.door("codes in every step", "horovod.torch")
@pytest.mark.parametrize(
    ("name", "options"), [("int8", {}), ("topk", {"k": 512}), ("powersgd", {"rank": 2}), ("fp16", {}), ("int4", {})]
)
def test_codes_train_alike_in_fewer_bytes(ranks2: Pool, name: str, options: dict[str, Any]) -> None:
    plain, (bits, loss, sent) = ranks2.run(coded, "none", {})[0], ranks2.run(coded, name, options)[1]
    assert bits == ranks2.run(coded, name, options)[0][0]
    assert loss < 1.1 * plain[1] and sent < 0.55 * plain[2]


@pytest.mark.parametrize(
    "function", [ways_of_stepping, unequal_use, adasum_steps, states, refusals, batch_norms, samplers], ids=lambda f: f.__name__
)
def test_what_goes_with_it(ranks2: Pool, function: Callable[[Rank], Any]) -> None:
    ranks2.run(function)


def test_ranks_outside_of_the_process_set_step_alone(ranks3: Pool) -> None:
    assert all(ranks3.run(in_a_process_set))


def test_training_goes_on_from_the_last_commit(ranks2: Pool) -> None:
    for seen, moved in ranks2.run(goes_on):
        assert seen == [0, 1, 2, 2, 3]
        assert torch.allclose(moved, torch.full_like(moved, 4.0))
