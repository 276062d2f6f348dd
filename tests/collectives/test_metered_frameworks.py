"""What PyTorch's own parallel tools send through the meter, by arithmetic on their parameters and activations."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from pool import Pool, Rank

WIDTH, HIDDEN, BATCH = 16, 32, 2
FIRST, SECOND = (WIDTH + 1) * HIDDEN, (HIDDEN + 1) * WIDTH
"""Parameters of the two layers."""

Rows = Counter[tuple[str, str, int]]
"""(axis, op, wire bytes of this rank in all such calls) -> calls."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH))


def batch(rank: int, size: int = BATCH) -> torch.Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(rank))


def rows(context: Rank) -> Rows:
    return Counter({(c.axis, c.op, t.wire_bytes): t.calls for c, t in context.recorded().items()})


def since(context: Rank) -> Rank:
    """The same rank, its record beginning now."""
    return Rank(context.rank, context.world_size, context.ledger, context.ledger.snapshot())


def alone(world_size: int) -> list[torch.Tensor]:
    """The reference: gradients of the mean loss over all ranks' batches, in one process."""
    reference = model()
    sum(reference(batch(rank)).square().sum() / world_size for rank in range(world_size)).backward()  # type: ignore
    return [parameter.grad for parameter in reference.parameters() if parameter.grad is not None]


def close(mine: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(mine, expected, strict=True))


def data_parallel(context: Rank) -> tuple[bool, Rows]:
    wrapped = DistributedDataParallel(model())
    step = since(context)
    wrapped(batch(context.rank)).square().sum().backward()
    return close([p.grad for p in wrapped.parameters()], alone(4)), rows(step)


def test_ddp_all_reduces_each_gradient_once(ranks4: Pool) -> None:
    for good, recorded in ranks4.run(data_parallel):
        assert good
        assert recorded["world", "all_reduce", 2 * 3 * (FIRST + SECOND) * 4 // 4] == 1
        assert [op for _, op, _ in recorded if op == "all_reduce"] == ["all_reduce"]


def hooked(context: Rank, num_steps: int) -> Any:
    ledger = context.ledger

    def hook(_state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        with ledger.label("gradients"):
            future = dist.all_reduce(bucket.buffer().div_(context.world_size), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    wrapped = DistributedDataParallel(model())
    wrapped.register_comm_hook(None, hook)
    for ledger.step in range(num_steps):
        wrapped.zero_grad()
        wrapped(batch(context.rank)).square().sum().backward()
    totals = {call.label: total for call, total in context.recorded().items() if call.op == "all_reduce"}
    return close([p.grad for p in wrapped.parameters()], alone(4)), totals


def test_a_ddp_hook_labels_from_the_autograd_thread(ranks4: Pool) -> None:
    for good, totals in ranks4.run(hooked, 3):
        assert good and list(totals) == ["gradients"]
        total = totals["gradients"]
        assert (total.calls, total.first_step, total.last_step) == (3, 0, 2)
        assert total.wire_bytes == 3 * 2 * 3 * (FIRST + SECOND)
        assert total.seconds > 0


def fully_sharded(context: Rank) -> tuple[bool, Rows]:
    wrapped = model()
    for layer in wrapped:
        fully_shard(layer)
    fully_shard(wrapped)
    step = since(context)
    wrapped(batch(context.rank)).square().sum().backward()
    return close([p.grad.full_tensor() for p in wrapped.parameters()], alone(4)), rows(step)


def test_fsdp2_gathers_parameters_twice_and_scatters_gradients_once(ranks4: Pool) -> None:
    for good, recorded in ranks4.run(fully_sharded):
        assert good
        scattered = [(wire, calls) for (_, op, wire), calls in recorded.items() if op == "reduce_scatter"]
        assert sorted(scattered) == sorted((2 * 3 * size * 4 // 4, 1) for size in (FIRST, SECOND))
        for size in (FIRST, SECOND):  # forward and backward: two gathers of 3/4 of the layer
            assert recorded["world", "all_gather", 2 * 3 * size * 4 // 4] == 2


def hybrid_sharded(context: Rank) -> Rows:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "data"))
    wrapped = model()
    fully_shard(wrapped, mesh=mesh)
    step = since(context)
    wrapped(batch(context.rank)).square().sum().backward()
    return rows(step)


def test_hybrid_sharding_scatters_inside_and_reduces_outside(ranks4: Pool) -> None:
    both = (FIRST + SECOND) * 4
    for recorded in ranks4.run(hybrid_sharded):
        assert recorded["data", "reduce_scatter", both] == 1
        assert recorded["outer", "all_reduce", both // 2] == 1
        assert sum(calls for (axis, op, _), calls in recorded.items() if (axis, op) == ("data", "all_gather")) >= 1


def tensor_parallel(context: Rank) -> tuple[bool, Rows]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    split = parallelize_module(model(), mesh["tensor"], plan)
    step = since(context)
    output = split(batch(0))
    output.sum().backward()
    return torch.allclose(output, model()(batch(0)), atol=1e-5), rows(step)


def test_tensor_parallel_layers_all_reduce_one_activation(ranks4: Pool) -> None:
    for good, recorded in ranks4.run(tensor_parallel):
        assert good and recorded == Counter({("tensor", "all_reduce", BATCH * WIDTH * 4): 1})


def redistribute(context: Rank) -> Any:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("data",))
    context.ledger.axes[dist.group.WORLD.group_name] = "data"  # a mesh of all ranks is the world's own group
    whole = torch.arange(64.0).reshape(8, 8)
    step = since(context)
    rowwise = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    again = rowwise.redistribute(placements=[Replicate()]).to_local()
    summed = DTensor.from_local(whole, mesh, [Partial()]).redistribute(placements=[Shard(0)]).full_tensor()
    return torch.equal(again, whole) and torch.equal(summed, 4 * whole), rows(step)


def test_redistribution_of_a_dtensor_is_metered(ranks4: Pool) -> None:
    part, whole = 64, 256  # bytes
    for good, recorded in ranks4.run(redistribute):
        assert good
        assert recorded["data", "reduce_scatter", 2 * 3 * whole // 4] == 1
        assert recorded["data", "all_gather", 2 * 3 * part] == 2
        assert recorded.total() == 3


def pipeline(context: Rank, num_micro_batches: int) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipe", "data"))
    stage_index = mesh.get_local_rank("pipe")
    layer = model()[stage_index]
    stage = PipelineStage(layer, stage_index, 2, torch.device("cpu"), group=mesh["pipe"].get_group())
    losses: list[torch.Tensor] = []
    schedule = Schedule1F1B(stage, num_micro_batches, loss_fn=lambda output, _: output.square().sum(), scale_grads=False)
    data = batch(0, size=BATCH * num_micro_batches)
    reports = []
    for _ in range(2):  # the first step also agrees on shapes
        layer.zero_grad()
        step = since(context)
        if stage_index == 0:
            schedule.step(data)
        else:
            schedule.step(target=torch.zeros(len(data)), losses=losses)
        reports.append(rows(step))
    reference = model()
    reference(data).square().sum().backward()
    return close([p.grad for p in layer.parameters()], [p.grad for p in reference[stage_index].parameters()]), reports[1]


def test_a_pipeline_sends_each_activation_down_and_its_gradient_up(ranks4: Pool) -> None:
    num_micro_batches = 4
    one_way = num_micro_batches * BATCH * HIDDEN * 4
    for good, recorded in ranks4.run(pipeline, num_micro_batches):
        assert good
        assert recorded == Counter({("pipe", "send", one_way): num_micro_batches, ("pipe", "recv", 0): num_micro_batches})


def save_and_load(context: Rank, folder: Path) -> tuple[bool, Rows]:
    saved, loaded = model(), model()
    for parameter in loaded.parameters():
        nn.init.zeros_(parameter)
    fully_shard(saved)
    fully_shard(loaded)
    step = since(context)
    checkpoint.save(saved.state_dict(), checkpoint_id=folder)
    state = loaded.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    loaded.load_state_dict(state)
    recorded = rows(step)
    pairs = zip(saved.parameters(), loaded.parameters(), strict=True)
    return all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs), recorded


def test_checkpoints_exchange_plans_and_no_parameters(ranks4: Pool, tmp_path: Path) -> None:
    results = ranks4.run(save_and_load, tmp_path / "checkpoint")
    assert all(good for good, _ in results)
    for _, recorded in results:
        assert {op for _, op, _ in recorded} >= {"gather", "scatter", "broadcast"}
    coordinator, follower = (Counter({op: wire for (_, op, wire) in results[rank][1]}) for rank in (0, 1))
    assert coordinator["scatter"] > 0 and follower["scatter"] == 0
    assert follower["gather"] > 0 and coordinator["gather"] == 0
