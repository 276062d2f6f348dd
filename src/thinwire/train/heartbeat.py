"""A heartbeat of every rank in the store where they met, and who has none: gloo says that a wait was in vain, not for whom.

    beat         each rank raises a counter of its own every b = min(1 s, timeout / 10), from a thread, whatever it waits for
    verdict      a rank whose wait fails reads all counters, reads them again 3 b later, and names the ranks that stood still. The
                 first verdict is kept in the store, so that all say the same; ranks that end because of it must not be blamed.
    alone        a rank that does not reach the store either can only say so

Some 100 B per rank and beat go to the host of rank 0. Like all that the store sends they are not in the ledger.
"""

import contextlib
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from thinwire.train.runtime import Place

MOST_BETWEEN_BEATS_S = 1.0
BEATS_IN_TIMEOUT = 10
BEATS_TO_JUDGE = 3
VERDICT = "verdict"


class PeerGone(RuntimeError):
    """An exchange failed. kind: "silent" if it was waited for in vain, for ranks that are named; else "timeout" or "lost"."""

    def __init__(self, kind: str, line: str) -> None:
        super().__init__(line)
        self.kind = kind


def symptom(error: BaseException) -> str | None:
    """What an exception of an exchange says: "timeout", "lost", or None where it is of another kind."""
    text = str(error)
    if isinstance(error, dist.DistError | RuntimeError):
        if "imed out" in text or "timeout" in text.lower():
            return "timeout"
        if any(word in text for word in ("Connection closed", "Connection reset", "Broken pipe", "connect")):
            return "lost"
    return None


class Heartbeat:
    """Of the rank at `place` on `host`. A context manager, inside of which the others hear it."""

    def __init__(self, place: Place, host: str, timeout_s: float) -> None:
        self._place, self._host, self._timeout_s = place, host, timeout_s
        self._beat_s = min(MOST_BETWEEN_BEATS_S, timeout_s / BEATS_IN_TIMEOUT)
        # A client of its own: one answers one thread at a time, and the rank's may be in a long wait.
        wait = timedelta(seconds=timeout_s)
        client = dist.TCPStore(place.master_address, place.master_port, is_master=False, timeout=wait, wait_for_workers=False)
        self._store: Any = dist.PrefixStore("heartbeat", client)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._store.set(f"host/{self._place.rank}", self._host)
        self._store.set(f"beat/{self._place.rank}", "0")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._end.set()

    def explained(self, error: BaseException) -> BaseException:
        """`error` itself, or where an exchange has failed, what is known about the others. Takes some beats."""
        seen = symptom(error)
        if seen is None:
            return error
        text = " ".join(str(error).split())[:160]
        found: list[str] = []

        def judge() -> None:
            with contextlib.suppress(RuntimeError):  # without a store there is nothing to find
                found.append(self._judge())

        # In a thread, since a call to a store that is cut off may never return.
        judge_thread = threading.Thread(target=judge, name="verdict", daemon=True)
        judge_thread.start()
        judge_thread.join((BEATS_TO_JUDGE + 2) * self._beat_s + MOST_BETWEEN_BEATS_S)
        if not found:
            store = f"the store on {self._place.master_address} where they met"
            return self._gone(seen, f"lost the other ranks, and {store}; look at this host's link")
        if not found[0]:
            return self._gone(
                seen, f"an exchange failed ({text}), though all ranks live; a slow network wants more train.timeout_s"
            )
        if seen == "timeout":
            why = f"gave up waiting for {found[0]} after {self._timeout_s:g} s (train.timeout_s)"
            return self._gone("silent", why)
        return self._gone(seen, f"lost the connection to {found[0]}")

    def _gone(self, kind: str, why: str) -> PeerGone:
        return PeerGone(
            kind, f"rank {self._place.rank} on {self._host} {why}; the last whole checkpoint is kept, go on with --resume"
        )

    def _judge(self) -> str:
        """The ranks that do not answer, "rank 2 on host2"; "" if all do."""
        if self._store.check([VERDICT]):
            told: bytes = self._store.multi_get([VERDICT])[0]  # `get` may look up names first, which can take seconds
            return told.decode()
        ranks = range(self._place.world_size)
        keys = [f"beat/{rank}" for rank in ranks]
        before = self._store.multi_get(keys)
        time.sleep(BEATS_TO_JUDGE * self._beat_s)
        still = [rank for rank, old, new in zip(ranks, before, self._store.multi_get(keys), strict=True) if old == new]
        if not still:
            return ""
        hosts = self._store.multi_get([f"host/{rank}" for rank in still])
        mine = " and ".join(f"rank {rank} on {host.decode()}" for rank, host in zip(still, hosts, strict=True))
        verdict: bytes = self._store.compare_set(VERDICT, "", mine)
        return verdict.decode()

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # without a store there is nobody to tell
            while not self._end.wait(self._beat_s):
                count += 1
                self._store.set(f"beat/{self._place.rank}", str(count))
