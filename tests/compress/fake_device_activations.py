"""Coded activations on fake tensors of `meta`, which stands for a device: what fails here would fail or wait on a GPU.

python fake_device_activations.py
"""

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from vectors import ALL, codec_of

from on_device import DEVICE, FromTheDevice
from thinwire.collectives.ledger import Ledger
from thinwire.compress.activations.boundary import BoundaryCodec, CodedBoundary
from thinwire.compress.activations.differences import Differences
from thinwire.compress.activations.partial_sums import coded_all_reduce, coded_gradient_sum


def run(kind: str, dtype: torch.dtype) -> None:
    codec, ledger = codec_of(kind), Ledger()
    x = torch.empty(4, 30, 50, dtype=dtype, device=DEVICE, requires_grad=True)
    crossed = CodedBoundary.apply(x, BoundaryCodec(codec, "a"), BoundaryCodec(codec, "g"))
    y = coded_gradient_sum(crossed, dist.group.WORLD, codec, ledger, "f")
    y = coded_all_reduce(y * 2, dist.group.WORLD, codec, ledger, "g")
    y.sum().backward()
    assert x.grad is not None and x.grad.device == y.device == DEVICE
    assert len(ledger.snapshot()) == 4, "two sums of two calls are entered"
    one, other = (Differences(codec, "boundary 0-1") for _ in range(2))
    for ids in ([0, 1, 2, 3], [3, 1, 5, 6]):
        assert other.unpack(one.pack(ids, x), ids, x.shape).device == DEVICE


def main() -> None:
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    with FakeTensorMode(), FromTheDevice():
        for kind in ALL:
            for dtype in (torch.float32, torch.bfloat16):
                run(kind, dtype)
            print("all on the device")


if __name__ == "__main__":
    main()
