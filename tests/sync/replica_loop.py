"""A training loop around a synchroniser that acts rarely, and what it leaves behind, for the tests of all such synchronisers."""

from typing import Any

import torch
from replicas_reference import STEPS, Net, adamw, batch, flat
from torch.distributed.device_mesh import init_device_mesh

from pool import Rank
from thinwire.collectives.ledger import difference
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.sync import Sync
from thinwire.layout import AXES, Layout
from thinwire.sync.make import make_synchroniser
from thinwire.workload import Workload


def run(
    context: Rank, config: Sync, compress: NoCompression | Coded, data: int, first: int, last: int, states: list[dict] | None
) -> dict[str, Any]:
    """Steps `first` to `last`, resumed from the `states` of all ranks, and the end of training if last is STEPS."""
    layout = Layout(outer=context.world_size // data, data=data)
    sync = make_synchroniser(config, compress, layout, context.ledger)
    model = Net()
    optimizer = adamw(model)
    if states is not None:
        model.load_state_dict(states[context.rank]["model"])
        optimizer.load_state_dict(states[context.rank]["optimizer"])
        sync.load_state_dict(states[context.rank]["sync"])
    mesh = init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)
    with sync.attached(model, optimizer, mesh) as module:
        with sync.rehearsal():
            for _ in range(2):
                module(batch(0, 0)).sum().backward()
        optimizer.zero_grad(set_to_none=False)
        before = context.ledger.snapshot()
        for step in range(first, last):
            with sync.microbatch(last=True):
                (module(batch(step, context.rank)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            sync.after_step(step)
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sync": sync.state_dict()}
        saved = {key: {k: v.clone() if torch.is_tensor(v) else v for k, v in value.items()} for key, value in saved.items()}
        sent = difference(context.ledger.snapshot(), before)
        local = flat(model)
        with sync.averaged():
            averaged = flat(model)
        back = torch.equal(flat(model), local)
        if last == STEPS:
            sync.finish()
        with sync.averaged():
            final = flat(model)
    workload = Workload.of_parameters([(name, tuple(p.shape)) for name, p in model.named_parameters()], 4)
    return {
        "state": saved,
        "local": local,
        "averaged": averaged,
        "back": back,
        "final": final,
        "sent": {(c.label, c.op, c.message_bytes, c.axis): (t.calls, t.wire_bytes) for c, t in sent.items()},
        "predicted": {(t.label, t.op, t.message_bytes, t.axis, t.every) for t in sync.traffic(workload, layout)},
    }
