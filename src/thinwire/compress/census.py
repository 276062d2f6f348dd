"""Ranks tell each other through a store what went wrong: for the rare step in which something did, beside all collectives.

Whoever finds a gradient that is not finite learns from all others what they have found (`census`). Whoever fails for a reason of
its own leaves it in the store (`leave`), for those that only see a connection end (`cause`).
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

LEFT = "failure"
LOOK_S, PAUSE_S, POLL_S = 3.0, 0.05, 0.002
"""How long a rank looks for the reason why a connection ended, and how often; and how often for what others have found."""


def not_finite(found: Mapping[str, list[int]], step: int) -> str:
    """One line: which gradient, on which ranks, when. found: by name, the ranks; none where only the average is not."""
    name, ranks = next(iter(found.items()))
    where = f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else "once it is averaged"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"the gradient of {name}{more} is not finite {where}, in step {step}; "
        "lower the learning rate, or look at the data of this step"
    )


class Meeting:
    """Of the ranks of `group`, which nobody else uses, in the store of the default group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        default = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"thinwire {group.group_name}", default)
        self._ranks, self._own = dist.get_process_group_ranks(group), dist.get_rank()

    def census(self, about: str, found: Sequence[str], timeout: timedelta) -> dict[str, list[int]]:
        """By name, the ranks that have found it. Collective: each rank of the group calls it once with the same `about`."""
        self._store.set(f"{about}/{self._own}", json.dumps(list(found)))
        by_name: dict[str, list[int]] = {}
        for rank in self._ranks:
            key = f"{about}/{rank}"
            if not self._comes(key, timeout.total_seconds(), POLL_S):
                raise RuntimeError(f"Timed out after {timeout.total_seconds():g} s waiting for {key}")
            for name in json.loads(self._store.get(key)):
                by_name.setdefault(name, []).append(rank)
        return by_name

    def leave(self, error: Exception) -> None:
        """Why this rank cannot go on; the first reason stays."""
        text = str(error) or type(error).__name__
        self._store.compare_set(LEFT, "", f"rank {self._own}: {text.splitlines()[0]}")

    def cause(self, look_s: float = LOOK_S) -> str | None:
        """What a rank has left, if any does within `look_s` seconds and the store still answers."""
        try:
            return self._store.get(LEFT).decode() if self._comes(LEFT, look_s, PAUSE_S) else None
        except RuntimeError:
            return None

    def _comes(self, key: str, within_s: float, pause_s: float) -> bool:
        """Asking again and again: whoever waits in a store keeps it from all other threads of this process, which may be about to
        say what others wait for."""
        end_s = time.monotonic() + within_s
        while not self._store.check([key]):
            if time.monotonic() > end_s:
                return False
            time.sleep(pause_s)
        return True
