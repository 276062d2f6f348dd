"""Runs exchanges on fake tensors of `meta`, which stands for a device: what fails here would fail or wait on a GPU.

python fake_device.py KIND ...
"""

import sys
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import thinwire.compress.coded
from on_device import DEVICE, FromTheDevice, as_saved
from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded
from thinwire.tomlfile import validate

SHAPES = {"word": (96, 64), "one.weight": (160, 96), "one.bias": (160,), "conv": (8, 16, 5, 5), "two.weight": (64, 130)}
CASES = ((torch.float32, True), (torch.bfloat16, False), (torch.float64, False))
"""dtype, and whether use is tracked."""


def run(kind: str, dtype: torch.dtype, tracks_use: bool) -> None:
    """In two lives, of which the second one goes on from a checkpoint."""
    config, state = validate(Coded, {"kind": kind, "exclude": []}, "test"), None
    for _ in range(2):
        exchange = make_exchange(config, Ledger(), "average")
        if state is not None:
            exchange.load_state_dict(state)
        exchange.attach(dist.group.WORLD, "data", SHAPES, DEVICE, tracks_use=tracks_use)
        assert exchange.on_device
        live(exchange, dtype, tracks_use)
        state = as_saved(exchange.state_dict())


def live(exchange: Any, dtype: torch.dtype, tracks_use: bool) -> None:
    for _ in range(2):
        first, pieces = 0, []
        for index, (name, shape) in enumerate(SHAPES.items()):
            pieces.append(Piece(name, first, shape))
            first += pieces[-1].numel
            if index % 2 == 0:  # two buckets of two, and one
                continue
            start(exchange, pieces, first, dtype, tracks_use, last=False)
            first, pieces = 0, []
        start(exchange, pieces, first, dtype, tracks_use, last=True)
        exchange.settle()


def start(exchange: Any, pieces: list[Piece], numel: int, dtype: torch.dtype, tracks_use: bool, *, last: bool) -> None:
    buffer = torch.empty(numel, dtype=dtype, device=DEVICE)
    used = {piece.name: True for piece in pieces} if tracks_use else None
    future = exchange.start(buffer, pieces, "bucket", last=last, used=used)
    if last:
        assert future.wait().device == DEVICE


def standing_in() -> FakeStore:
    """For a fake group, which from now on is the exchange's own too."""
    thinwire.compress.coded.private_copy = lambda group, *_: group
    thinwire.compress.coded.release = lambda *_: None
    thinwire.compress.coded.backend_of = lambda *_: "fake"
    return FakeStore()


def main() -> None:
    dist.init_process_group("fake", rank=1, world_size=4, store=standing_in())
    with FakeTensorMode(), FromTheDevice():
        for kind, (dtype, tracks_use) in product(sys.argv[1:], CASES):
            print(kind, dtype, "use is tracked" if tracks_use else "")
            run(kind, dtype, tracks_use)
    print("all on the device")


if __name__ == "__main__":
    main()
