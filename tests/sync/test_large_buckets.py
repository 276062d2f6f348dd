"""PyTorch's own bucket sizes, on a model that needs several of them."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank
from thinwire.config.run import EveryStep
from thinwire.layout import Layout
from thinwire.sync.every_step import EveryStepSync
from thinwire.workload import Workload


def sent_and_predicted(context: Rank) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(9)])
    sync = EveryStepSync(EveryStep(), "data", context.ledger)
    workload = Workload.of_parameters([(name, tuple(p.shape)) for name, p in model.named_parameters()], 1)
    predicted = {(transfer.label, transfer.message_bytes) for transfer in sync.traffic(workload, Layout(data=context.world_size))}
    mesh = init_device_mesh("cpu", (context.world_size,), mesh_dim_names=("data",))
    with sync.attached(model, torch.optim.SGD(model.parameters()), mesh) as replica:
        replica(torch.ones(1, 1024)).sum().backward()
        before = context.ledger.snapshot()
        replica(torch.ones(1, 1024)).sum().backward()
    sent = {
        (call.label, call.message_bytes) for call in context.recorded() if call.label.startswith("bucket") and call not in before
    }
    return sent, predicted


def test_default_buckets_are_those_of_pytorch(ranks2: Pool) -> None:
    for sent, predicted in ranks2.run(sent_and_predicted):
        assert sent == predicted and len(predicted) == 3
