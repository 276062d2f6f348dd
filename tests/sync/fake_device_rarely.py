"""Replicas that exchange rarely, on fake tensors of `meta` in place of a device: what fails here would fail or wait on a GPU.

python fake_device_rarely.py KIND ..
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rarely_kinds import KINDS, net
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import thinwire.compress.coded
import thinwire.compress.passes
import thinwire.sync.noloco
import thinwire.sync.standalone
from on_device import DEVICE, FromTheDevice, as_saved
from thinwire.compress.passes import Found
from thinwire.sync.shards import Shards


def fetched(step: int, number: int, names: list[str], spoiled: torch.Tensor, bad: torch.Tensor) -> Found:
    """What comes to the host by itself."""
    assert spoiled.device == bad.device == DEVICE
    return Found(step, number, names, False, bad, None)  # type: ignore[arg-type]


def run(options: dict[str, Any]) -> None:
    with FakeTensorMode(), FromTheDevice(by_itself=True):
        model, state = net("meta"), None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for life in range(2):
            outer = thinwire.DiLoCo(model, optimizer, **options)
            if state is not None:
                outer.load_state_dict(state)
            with outer:
                for _ in range(5):
                    for parameter in model.parameters():
                        parameter.grad = torch.ones_like(parameter)
                    optimizer.step()
                    with outer.averaged():
                        pass
                state = as_saved(outer.state_dict())
            assert outer.steps == 5 * (life + 1) and outer.sent_bytes > 0
        assert all(parameter.device == DEVICE for parameter in model.parameters())
    print("all on the device")


if __name__ == "__main__":
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    for module in (thinwire.compress.coded, thinwire.sync.standalone):
        module.private_copy = lambda group, *_: group
        module.release = lambda *_: None
        module.backend_of = lambda *_: "fake"
    thinwire.sync.standalone.make_same = lambda *_: None  # set-up may read on the host
    Shards.check_same_everywhere = lambda *_: None
    DeviceMesh.from_group = lambda group, *_, **__: SimpleNamespace(get_group=lambda axis: group)  # reads its own ranks
    thinwire.compress.passes._fetched = fetched
    thinwire.sync.noloco.swap = lambda tensor, *_: torch.empty_like(tensor)  # the fake group knows no messages on meta
    for name in sys.argv[1:]:
        run(dict(KINDS[name]))
