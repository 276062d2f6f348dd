"""What exchanges of many buckets hold on a device beside gradients and residuals, counted on fake tensors of `meta`.

python fake_device_memory.py KIND ..

Prints of each kind what stays between passes, in sizes of all gradients, and what a pass holds at most beside twice that, in
sizes of a bucket.
"""

import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist
from fake_device import standing_in
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from on_device import DEVICE
from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded
from thinwire.tomlfile import validate

BUCKETS, SHAPE = 12, (512, 512)
NUMEL = SHAPE[0] * SHAPE[1]


class Held(TorchDispatchMode):
    """Bytes of the device's storages that somebody holds, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.device == DEVICE:
                storage = one.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
                self.most = max(self.most, self.now)
        return result

    def _gone(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


def run(kind: str) -> None:
    exchange = make_exchange(validate(Coded, {"kind": kind, "exclude": []}, "test"), Ledger(), "average")
    exchange.attach(dist.group.WORLD, "data", {f"{bucket}": SHAPE for bucket in range(BUCKETS)}, DEVICE)
    gradient_bytes, passes = 4 * BUCKETS * NUMEL, []
    with FakeTensorMode(), Held() as held:
        buffers = [torch.empty(NUMEL, device=DEVICE) for _ in range(BUCKETS)]
        for _ in range(3):
            held.most = held.now
            for bucket, buffer in enumerate(buffers):
                exchange.start(buffer, [Piece(f"{bucket}", 0, SHAPE)], "bucket", last=bucket == BUCKETS - 1)
            exchange.settle()
            passes.append((held.most, held.now))
    most, kept = ((size - gradient_bytes) / gradient_bytes for size in passes[-1])
    assert passes[1] == passes[2], "nothing grows from pass to pass"
    print(kind, kept, BUCKETS * (most - 2 * kept))


if __name__ == "__main__":
    dist.init_process_group("fake", rank=1, world_size=4, store=standing_in())
    for name in sys.argv[1:]:
        run(name)
