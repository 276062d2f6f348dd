"""A store for gloo's rendezvous that asks again and again instead of waiting.

A TCPStore client answers one thread at a time, so one that waits would stop the hearts of all others. It also looks up the name
of its peer's address when it connects or waits, for its log; where a name server is slow to answer, that takes seconds. So a
process has one client, which nobody waits in.
"""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_ASK_AGAIN_S = 0.003


class Polled(dist.Store):
    """`store` seen through calls that never wait in it."""

    def __init__(self, store: dist.Store, timeout_s: float) -> None:
        super().__init__()
        self._store: Any = store
        self._timeout_s = timeout_s

    def set(self, key: str, value: Any) -> None:
        """As any store."""
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Waits until it is there."""
        self.wait([key])
        value: bytes = self._store.get(key)
        return value

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        """RuntimeError when the time is over."""
        limit_s = self._timeout_s if timeout is None else min(self._timeout_s, timeout.total_seconds())
        end = time.monotonic() + limit_s
        while not self._store.check(list(keys)):
            if time.monotonic() > end:
                raise RuntimeError(f"nobody wrote {', '.join(keys)} within {limit_s:g} s")
            time.sleep(_ASK_AGAIN_S)
