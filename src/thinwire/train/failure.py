"""One line for whatever goes wrong on a rank: who was silent, and the file in which a launcher looks for the line.

gloo reports that a wait was in vain, not for which rank. So each rank has a heartbeat in the store where the ranks met:

    heartbeat    each rank raises a counter of its own every b = min(1 s, timeout / 10), from a thread, whatever it waits for
    verdict      a rank whose wait fails reads all counters, reads them again 3 b later, and names the ranks that stood still. The
                 first verdict is kept in the store, so that all give the same; ranks that end because of it must not be blamed.
    alone        a rank that does not reach the store either can only report that

Some 100 B per rank and heartbeat go to the host of rank 0. Like all that the store sends they are not in the ledger.
"""

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from thinwire.collectives.address import advice
from thinwire.environment import Place, lives
from thinwire.errors import UserError

MOST_BETWEEN_HEARTBEATS_S = 1.0
HEARTBEATS_IN_TIMEOUT = 10
HEARTBEATS_TO_JUDGE = 3
VERDICT = "verdict"
KINDS = ("user", "error", "silent", "timeout", "lost")
"""A mistake of the user; anything unexpected; ranks that are known to be silent; waited too long for another rank; another rank
went away. The first explains the others: a rank that fails makes its peers wait, or lose it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a rank reports. kind: one of KINDS."""

    kind: str
    line: str


class PeerGone(RuntimeError):
    """An exchange failed. kind: "silent" if it was waited for in vain, for ranks that are named; else "timeout" or "lost"."""

    def __init__(self, kind: str, line: str) -> None:
        super().__init__(line)
        self.kind = kind


def symptom(error: BaseException) -> str | None:
    """The kind of an exchange's exception, "timeout" or "lost"; None for any other exception."""
    text = str(error)
    if isinstance(error, dist.DistError | RuntimeError | ConnectionError):
        if "imed out" in text or "timeout" in text.lower():
            return "timeout"
        if any(word in text for word in ("Connection closed", "Connection reset", "Broken pipe", "connect")):
            return "lost"
    return None


def explain(error: BaseException, place: Place | None) -> Failure:
    """One line for an exception on the rank at `place`."""
    if isinstance(error, UserError):
        return Failure("user", str(error))
    if isinstance(error, PeerGone):
        return Failure(error.kind, str(error))
    who, text = f"rank {place.rank}: " if place else "", " ".join(str(error).split())
    match symptom(error):
        case "timeout":
            patience = "if the network is only slow, raise train.timeout_s; the last whole checkpoint is kept"
            return Failure("timeout", f"{who}gave up waiting for another rank ({text[:160]}); {patience}")
        case "lost":
            lost = f"{who}lost the connection to another rank ({text[:160]}){advice(text)}"
            return Failure("lost", f"{lost}; the last whole checkpoint is kept")
    return Failure("error", f"{who}{type(error).__name__}: {text[:300]}")


def write_error_file(path: Path, failure: Failure) -> None:
    """For the launcher, in the form that torchrun's agent reads."""
    extra = {"timestamp": str(int(time.time())), "kind": failure.kind}
    path.write_text(json.dumps({"message": {"message": failure.line, "extraInfo": extra}}), encoding="utf-8")


def read_error(data: Any) -> Failure | None:
    """What `write_error_file` wrote, from the data that the agent has read; None if a rank has left nothing of the kind."""
    try:
        return Failure(data["message"]["extraInfo"]["kind"], data["message"]["message"])
    except (KeyError, TypeError):
        return None


class Heartbeat:
    """Of the rank at `place` on `host`. A context manager, inside of which the counter goes up."""

    def __init__(self, place: Place, host: str, timeout_s: float) -> None:
        self._place, self._host, self._timeout_s = place, host, timeout_s
        self._interval_s = min(MOST_BETWEEN_HEARTBEATS_S, timeout_s / HEARTBEATS_IN_TIMEOUT)
        # A client of its own: one answers one thread at a time, and the rank's may be in a long wait.
        wait = timedelta(seconds=timeout_s)
        client = dist.TCPStore(place.master_address, place.master_port, is_master=False, timeout=wait, wait_for_workers=False)
        self._store: Any = dist.PrefixStore(f"heartbeat {lives()}", client)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._count, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._store.set(f"host/{self._place.rank}", self._host)
        self._store.set(f"beat/{self._place.rank}", "0")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._end.set()
        # A call to the store that came back while the interpreter ends would abort the process, though the run was over; one
        # over a link that is cut may never come back.
        self._thread.join(HEARTBEATS_TO_JUDGE * self._interval_s)

    def explained(self, error: BaseException) -> BaseException:
        """`error` itself, or where an exchange has failed, what is known about the others. Takes some heartbeats."""
        kind = symptom(error)
        if kind is None:
            return error
        text = " ".join(str(error).split())[:160]
        verdicts: list[str] = []

        def judge() -> None:
            with contextlib.suppress(RuntimeError):  # without a store there is nothing to find
                verdicts.append(self._judge())

        # In a thread, since a call to a store that is cut off may never return.
        judge_thread = threading.Thread(target=judge, name="verdict", daemon=True)
        judge_thread.start()
        judge_thread.join((HEARTBEATS_TO_JUDGE + 2) * self._interval_s + MOST_BETWEEN_HEARTBEATS_S)
        if not verdicts:
            why = f"lost the other ranks, and the store on {self._place.master_address} where they met; look at this host's link"
        elif not verdicts[0]:
            why = f"an exchange failed ({text}), though all ranks live; a slow network needs more train.timeout_s"
        elif kind == "timeout":
            kind, why = "silent", f"gave up waiting for {verdicts[0]} after {self._timeout_s:g} s (train.timeout_s)"
        else:
            why = f"lost the connection to {verdicts[0]}"
        return PeerGone(
            kind, f"rank {self._place.rank} on {self._host} {why}; the last whole checkpoint is kept, go on with --resume"
        )

    def _judge(self) -> str:
        """The ranks that do not answer, "rank 2 on host2"; "" if all do."""
        if self._store.check([VERDICT]):
            known: bytes = self._store.multi_get([VERDICT])[0]  # `get` may look up names first, which can take seconds
            return known.decode()
        ranks = range(self._place.world_size)
        keys = [f"beat/{rank}" for rank in ranks]
        before = self._store.multi_get(keys)
        time.sleep(HEARTBEATS_TO_JUDGE * self._interval_s)
        still = [rank for rank, old, new in zip(ranks, before, self._store.multi_get(keys), strict=True) if old == new]
        if not still:
            return ""
        hosts = self._store.multi_get([f"host/{rank}" for rank in still])
        mine = " and ".join(f"rank {rank} on {host.decode()}" for rank, host in zip(still, hosts, strict=True))
        verdict: bytes = self._store.compare_set(VERDICT, "", mine)
        return verdict.decode()

    def _count(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0
            while not self._end.wait(self._interval_s):
                count += 1
                self._store.set(f"beat/{self._place.rank}", str(count))
