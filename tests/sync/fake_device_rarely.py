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
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import thinwire.compress.coded
import thinwire.compress.passes
import thinwire.sync.noloco
from thinwire.collectives.ledger import Ledger
from thinwire.compress.passes import Found
from thinwire.layout import Layout
from thinwire.sync.make import make_synchroniser
from thinwire.sync.standalone import KINDS as SECTIONS
from thinwire.sync.standalone import _coding
from thinwire.tomlfile import validate

DEVICE = torch.device("meta")


class FromTheDevice(TorchDispatchMode):
    """Refuses what copies from the device to the host, and does not go on by itself."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in args if isinstance(one, torch.Tensor)]
        result = function(*args, **kwargs)
        on_host = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        by_itself = function is torch.ops.aten.copy_.default and (args[2:] or [kwargs.get("non_blocking")])[0]
        if on_host and not by_itself and any(one.device == DEVICE for one in given):
            raise AssertionError(f"{function} copies from the device to the host")
        return result


def fetched(step: int, number: int, names: list[str], spoiled: torch.Tensor, bad: torch.Tensor) -> Found:
    """What comes to the host by itself."""
    assert spoiled.device == bad.device == DEVICE
    return Found(step, number, names, False, bad, None)  # type: ignore[arg-type]


def run(options: dict[str, Any]) -> None:
    compress, kind = options.pop("compress", None), options.pop("kind", "diloco")
    config = validate(SECTIONS[kind], options, "test")
    sync = make_synchroniser(config, _coding(kind, compress), Layout(outer=4), ledger := Ledger())
    mesh: Any = SimpleNamespace(get_group=lambda axis: dist.group.WORLD)
    with FakeTensorMode(), FromTheDevice():
        model, state = net("meta"), None
        for life in range(2):
            if state is not None:
                sync = make_synchroniser(config, _coding(kind, compress), Layout(outer=4), ledger)
                sync.load_state_dict(state)
            with sync.attached(model, torch.optim.SGD(model.parameters()), mesh):
                for step in range(5 * life, 5 * life + 5):
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.mul_(2)
                    sync.after_step(step)
                    with sync.averaged():
                        pass
                state = sync.state_dict()
        assert all(parameter.device == DEVICE for parameter in model.parameters())
        sent = [call.op for call, total in ledger.snapshot().items() if total.wire_bytes]
    assert sent, "nothing was entered in the ledger"
    print("all on the device")


if __name__ == "__main__":
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    thinwire.compress.coded.private_copy = lambda group, *_: group
    thinwire.compress.coded.release = lambda *_: None
    thinwire.compress.coded.backend_of = lambda *_: "fake"
    thinwire.compress.passes._fetched = fetched
    thinwire.sync.noloco.swap = lambda tensor, *_: torch.empty_like(tensor)  # the fake group knows no messages on meta
    for name in sys.argv[1:]:
        run(dict(KINDS[name]))
