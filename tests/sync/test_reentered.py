"""`thinwire.DiLoCo` entered again and again: it goes on where it was, sends what is trained, and leaves nothing behind."""

import copy
import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import long
from torch import nn
from torch.distributed.distributed_c10d import _world

import thinwire
from pool import Pool, Rank
from thinwire.collectives.groups import timeout_of
from thinwire.errors import UserError

KINDS: dict[str, dict[str, Any]] = {
    "diloco": {},
    "coded": {"compress": {"kind": "int4", "vectors": True}},
    "streaming": {"kind": "streaming", "layers_per_fragment": 1, "overlap": 2},
    "added": {"kind": "streaming", "layers_per_fragment": 1, "overlap": 2, "arrival": "add"},
    "sparseloco": {"kind": "sparseloco"},
    "noloco": {"kind": "noloco"},
}
EVERY = 4


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 * rank + step))
        (model(batch) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in model.parameters()])


def epochs(context: Rank, options: dict[str, Any], resumed: bool) -> dict[str, Any]:
    """Three blocks of EVERY steps with one object, perhaps from a checkpoint of a first one; then one without a step."""
    model = net()
    optimizer = sgd(model)
    outer = thinwire.DiLoCo(model, optimizer, every=EVERY, **options)
    if resumed:
        with outer:
            train(model, optimizer, context.rank, range(EVERY))
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), outer.state_dict()))
        model, optimizer = net(), None
        model.load_state_dict(saved[0])
        optimizer = sgd(model)
        optimizer.load_state_dict(saved[1])
        outer = thinwire.DiLoCo(model, optimizer, every=EVERY, **options)
        outer.load_state_dict(saved[2])
        again = outer.state_dict()  # nothing of it is lost before it is used
        assert again["steps"] == EVERY and again["sync"] == saved[2]["sync"]
    ends = [flat(model)]
    for number in range(3):
        with outer:
            train(model, optimizer, context.rank, range(number * EVERY, (number + 1) * EVERY))
        ends.append(flat(model))
    with outer:
        pass
    ends.append(flat(model))
    return {"ends": ends, "steps": outer.steps}


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [2, long(1), long(4)])
def test_a_block_without_a_step_moves_nothing(request: pytest.FixtureRequest, kind: str, number: int, resumed: bool) -> None:
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    for one in (results := ranks.run(epochs, KINDS[kind], resumed)):
        assert torch.equal(one["ends"][-1], one["ends"][-2])
        assert all(not torch.equal(before, after) for before, after in zip(one["ends"][:-2], one["ends"][1:-1], strict=True))
        assert all(torch.equal(ours, first) for ours, first in zip(one["ends"][1:], results[0]["ends"][1:], strict=True))
        assert one["steps"] == (4 if resumed else 3) * EVERY


def with_momentum(context: Rank, kind: str, blocks: int) -> torch.Tensor:
    """As many steps in one block as in several, each of which ends with an exchange anyway."""
    model = net()
    optimizer = sgd(model)
    outer = thinwire.DiLoCo(model, optimizer, every=EVERY, **KINDS[kind])
    steps = 6 * EVERY // blocks
    for block in range(blocks):
        with outer:
            train(model, optimizer, context.rank, range(block * steps, (block + 1) * steps))
    return flat(model)


@pytest.mark.parametrize("kind", ["diloco", "coded", "sparseloco"])
@pytest.mark.parametrize("number", [2, long(1), long(4)])
def test_several_blocks_are_one_with_the_outer_momentum(request: pytest.FixtureRequest, kind: str, number: int) -> None:
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    assert torch.equal(ranks.run(with_momentum, kind, 1)[0], ranks.run(with_momentum, kind, 3)[0])


def interrupted(context: Rank, options: dict[str, Any], cut: int | None) -> torch.Tensor:
    """All replicas leave by an exception in the middle of a period, and enter again."""
    model = net()
    optimizer = sgd(model)
    outer = thinwire.DiLoCo(model, optimizer, every=EVERY, **options)
    if cut is not None:
        with pytest.raises(ZeroDivisionError), outer:
            train(model, optimizer, context.rank, range(cut))
            _ = 1 / 0
    with outer:
        train(model, optimizer, context.rank, range(cut or 0, 3 * EVERY))
    return flat(model)


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_exception_it_goes_on_as_if_there_had_been_none(ranks2: Pool, kind: str) -> None:
    whole = ranks2.run(interrupted, KINDS[kind], None)
    cut = ranks2.run(interrupted, KINDS[kind], 2 * EVERY - 1)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


def shorter(context: Rank, overlap: int) -> int:
    """Saved with an exchange under way for 5 steps, resumed with a shorter overlap: how many steps later it has arrived."""
    model = net()
    optimizer = sgd(model)
    options = {"kind": "streaming", "layers_per_fragment": 9, "every": 6, "compress": None}
    with thinwire.DiLoCo(model, optimizer, overlap=5, **options) as outer:
        train(model, optimizer, context.rank, range(9))
        saved = copy.deepcopy(outer.state_dict())
    assert saved["sync"]["fragments"][0]["under_way"] is not None
    anchor = saved["sync"]["fragments"][0]["anchor"]
    again = thinwire.DiLoCo(model, optimizer, overlap=overlap, **options)
    again.load_state_dict(saved)
    with again:
        for step in range(9, 15):
            train(model, optimizer, context.rank, range(step, step + 1))
            now = again.state_dict()["sync"]["fragments"][0]
            if not torch.equal(now["anchor"], anchor):
                return step - 8
    return 0


@pytest.mark.parametrize(("overlap", "steps"), [(5, 2), (4, 1), (1, 1), (0, 1)])
def test_an_exchange_under_way_is_not_dropped_by_a_shorter_overlap(ranks2: Pool, overlap: int, steps: int) -> None:
    assert ranks2.run(shorter, overlap) == [steps] * 2


def left_behind(context: Rank, options: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """(threads, open files, process groups, axes in the ledger) after each of eight blocks."""
    model = net()
    optimizer = sgd(model)
    outer = thinwire.DiLoCo(model, optimizer, every=2, **options)
    found = []
    for number in range(8):
        with outer:
            train(model, optimizer, context.rank, range(2 * number, 2 * number + 2))
        dist.barrier()
        tasks, files = (len(os.listdir(f"/proc/self/{folder}")) for folder in ("task", "fd"))
        found.append((tasks, files, len(_world.pg_map), len(outer.ledger.axes)))
    return found


@pytest.mark.parametrize("kind", ["diloco", "coded", "noloco"])
@pytest.mark.parametrize("number", [2, long(1), long(4)])
def test_blocks_leave_no_threads_files_or_groups(request: pytest.FixtureRequest, kind: str, number: int) -> None:
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    for found in ranks.run(left_behind, KINDS[kind]):
        first, last = found[0], found[-1]
        assert last[2:] == first[2:]
        assert last[0] <= first[0] + 1 and last[1] <= first[1] + 1, found  # one may be about to end


class Adapted(nn.Module):
    """A frozen matrix with a trained adapter of rank 2, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(64, 64)
        self.frozen.requires_grad_(False)
        self.down, self.up = nn.Linear(64, 2, bias=False), nn.Linear(2, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.up(self.down(x))


def adapters(context: Rank, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Adapted()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.05)
    outer = thinwire.DiLoCo(model, optimizer, every=2, **options)
    with outer:
        for _ in range(4):
            model(torch.ones(2, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = outer.state_dict()["sync"]
    calls = outer.ledger.snapshot().items()
    sent = sum(call.message_bytes * total.calls for call, total in calls if call.op == "all_reduce" and total.last_step > 0)
    messages = None
    with outer:
        model.frozen.requires_grad_(True)
        try:
            for _ in range(2):
                optimizer.step()
        except UserError as error:
            messages = str(error)
        model.frozen.requires_grad_(False)
    return {"sent": sent, "kept": kept, "message": messages}


def test_frozen_parameters_are_neither_kept_nor_sent(ranks2: Pool) -> None:
    for one in ranks2.run(adapters, {}):
        assert one["sent"] <= 4 * 256 * 3
        assert sum(fragment["anchor"].numel() for fragment in one["kept"]["fragments"]) == 256
        assert "frozen.weight was frozen, or is trained, since" in one["message"]
    for one in ranks2.run(adapters, {"kind": "noloco"}):
        assert sum(slow.numel() for slow in one["kept"]["slow"]) == 256
        assert "frozen.weight was frozen, or is trained, since" in one["message"]


class Expanded(nn.Module):
    """With buffers and parameters that are not one piece of memory of their own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(6, 5).t())
        self.register_buffer("mask", torch.randn(1, 7).expand(8, 7))
        order = torch.channels_last if seed else torch.contiguous_format
        self.register_buffer("image", torch.randn(2, 3, 4, 5).contiguous(memory_format=order))
        self.register_buffer("sliced", torch.randn(8, 8)[:, ::2])


def beside(context: Rank) -> dict[str, Any]:
    model = Expanded(seed=context.rank)
    storage = model.mask.untyped_storage()
    wide = torch.empty(0).set_(storage)  # all of the memory that is its own
    with thinwire.DiLoCo(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        pass
    first = Expanded(seed=0)
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    wanted = dict(first.named_parameters()) | dict(first.named_buffers())
    same = {name: torch.equal(values[name], wanted[name]) for name in wanted}
    return {"same": same, "own": len(wide), "stride": model.mask.stride()}


def test_what_a_collective_is_handed_is_contiguous_and_its_own(ranks2: Pool) -> None:
    for one in ranks2.run(beside):
        assert all(one["same"].values()), one
        assert one["own"] == 7 and one["stride"] == (0, 1)


def states(context: Rank) -> dict[str, str]:
    """The messages about states that would not be used."""
    model = net()
    half = dist.new_group([context.rank])
    messages = {}

    def refused(name: str, call: Any) -> None:
        with pytest.raises(UserError) as caught:
            call()
        messages[name] = str(caught.value)

    def make(group: Any = None, **options: Any) -> Any:
        return thinwire.DiLoCo(model, sgd(model), every=2, group=group, **options)

    outer = make(compress={"kind": "int4", "vectors": True})
    with outer:
        train(model, outer._optimizer, context.rank, range(2))
        state = outer.state_dict()
        refused("inside", lambda: outer.load_state_dict(state))
    refused("replicas", lambda: make(half, compress="int4").load_state_dict(state))
    refused("kind", lambda: make(kind="noloco").load_state_dict(state))
    refused("adopt", lambda: make(compress="int4").adopt([state]))
    refused("code", lambda: make(compress="int8").load_state_dict(state))
    refused("plain", lambda: make().load_state_dict(state))
    return messages


def test_states_that_would_not_be_used_are_refused(ranks2: Pool) -> None:
    messages = ranks2.run(states)[0]
    assert "before the with block, not inside" in messages["inside"]
    assert "one of 2 replicas, and there are 1" in messages["replicas"] and "adopt()" in messages["replicas"]
    assert "of kind = 'diloco', and this one is 'noloco'" in messages["kind"]
    assert "adopt() wants the states of all replicas of a run, and has 1" in messages["adopt"]
    assert "compress.kind = 'int4', not 'int8'" in messages["code"]
    assert "compress.kind = 'int4', not 'none'" in messages["plain"]


def adopted(context: Rank, options: dict[str, Any]) -> dict[str, Any]:
    """Two replicas of two ranks' worth become four: residuals stay in the sum, and all begin alike."""
    half = [dist.new_group([0, 1]), dist.new_group([2, 3])][context.rank // 2]
    model = net()
    optimizer = sgd(model)
    with thinwire.DiLoCo(model, optimizer, every=3, group=half, **options) as outer:
        train(model, optimizer, context.rank % 2, range(4))
        state = outer.state_dict()
    both: list[Any] = [None, None]
    dist.all_gather_object(both, state, group=half)
    again = net(seed=context.rank)
    optimizer = sgd(again)
    more = thinwire.DiLoCo(again, optimizer, every=3, **options)
    more.adopt(both)
    with more:
        first = flat(again)
        train(again, optimizer, context.rank, range(4, 9))
    return {"first": first, "end": flat(again), "steps": more.steps}


@pytest.mark.parametrize("kind", ["diloco", "coded", "added", "noloco"])
def test_other_numbers_of_replicas_adopt_the_states_of_all(ranks4: Pool, kind: str) -> None:
    results = ranks4.run(adopted, KINDS[kind])
    for one in results:
        assert torch.equal(one["first"], results[0]["first"]) and torch.equal(one["end"], results[0]["end"])
        assert one["steps"] == 9


def groups(context: Rank) -> list[tuple[str, timedelta]]:
    """Every group that is made while a user's DistributedDataParallel, FSDP2 and DiLoCo run through ours, with its time-out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    made: list[tuple[str, timedelta]] = []
    new_group = dist.new_group

    def noted(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        if isinstance(group, dist.ProcessGroup):
            made.append((group.group_desc, timeout_of(group)))
        return group

    dist.new_group = dist.distributed_c10d.new_group = dist.device_mesh.new_group = noted  # type: ignore[attr-defined]
    try:
        mesh = init_device_mesh("cpu", (1, context.world_size), mesh_dim_names=("outer", "shard"))
        exchange = thinwire.compress_gradients(DistributedDataParallel(net()), "int4")
        exchange.detach()
        sharded = fully_shard(nn.Linear(64, 64), mesh=mesh["shard"])
        thinwire.compress_sharded(sharded).detach()
        for options in KINDS.values():
            model = net()
            with thinwire.DiLoCo(model, sgd(model), **options):
                pass
    finally:
        dist.new_group = dist.distributed_c10d.new_group = dist.device_mesh.new_group = new_group  # type: ignore[attr-defined]
    return made


def test_every_group_has_the_users_time_out(ranks2: Pool) -> None:
    """That of the pool, which is none of torch's own."""
    for made in ranks2.run(groups):
        names = {name for name, _ in made}
        assert {"mesh_outer", "data exchange first", "data exchange second", "outer exchange first"} <= names
        assert {"sharded weights", "sharded gradients"} <= names
        assert {timeout for _, timeout in made} == {timedelta(seconds=60)}, made


def cannot_hold(context: Rank) -> str:
    """The first rank's buffer has values of its own where the second's are one."""
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.randn(8, 7) if context.rank == 0 else torch.randn(1, 7).expand(8, 7))
    with pytest.raises(UserError) as caught:
        thinwire.DiLoCo(model, sgd(model)).__enter__()
    return str(caught.value)


def test_memory_that_cannot_hold_the_first_ranks_values_is_said_on_all_ranks(ranks2: Pool) -> None:
    first, second = ranks2.run(cannot_hold)
    assert "a tensor of another rank keeps several values in one place" in first
    assert "mask of shape (8, 7) keeps several values in one place" in second
