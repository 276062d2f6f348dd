"""Files from disk to disk, over the ranks' own process group."""

from pathlib import Path

import torch
import torch.distributed as dist

from thinwire.train.checkpoint.files import sync

CHUNK_BYTES = 1 << 24


def send_file(path: Path, size: int, target: int, group: dist.ProcessGroup | None = None) -> None:
    """`size` bytes to the global rank `target`, which calls `receive_file`. Blocks."""
    with path.open("rb") as file:
        for first in range(0, size, CHUNK_BYTES):
            part = torch.frombuffer(bytearray(file.read(min(CHUNK_BYTES, size - first))), dtype=torch.uint8)
            dist.send(part, target, group=group)


def receive_file(path: Path, size: int, source: int, group: dist.ProcessGroup | None = None) -> None:
    """On the disk when this returns. OSError if it cannot be written; all is received even so, because the sender waits."""
    error: OSError | None = None
    for first in range(0, size, CHUNK_BYTES):
        part = torch.empty(min(CHUNK_BYTES, size - first), dtype=torch.uint8)
        dist.recv(part, source, group=group)
        try:
            with path.open("ab") as file:
                file.write(part.numpy().tobytes())
        except OSError as reason:
            error = error or reason
    if error:
        raise error
    sync(path)
