"""When a rank stood still within its passes, because it needed what other ranks had: those seconds are not computing.

Passes before training are entered in the ledger under a label of their own, so that what steps send can be told from them.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from thinwire.collectives.ledger import Clock

SETUP = "replica set-up"


@dataclass
class Waits:
    """Of one rank, since `clear`. clock: by which moments are noted; None: none are. ends: when each wait began and was over."""

    clock: Clock | None = None
    ends: list[tuple[Any, Any]] = field(default_factory=list)
    _label: str = ""

    def begin(self) -> Any:
        """The moment, for `end`."""
        return None if self.clock is None else self.clock.now()

    def end(self, begun: Any) -> None:
        if self.clock is not None:
            self.ends.append((begun, self.clock.now()))

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Inside, this rank waits."""
        begun = self.begin()
        yield
        self.end(begun)

    def clear(self) -> None:
        self.ends.clear()

    def seconds(self) -> float:
        """Of all waits; on a device, when they are over."""
        return 0.0 if self.clock is None else sum(self.clock.seconds(*ends) for ends in self.ends)

    def since(self, moment: float) -> float:
        """Seconds of those that began after a moment of the host's clock."""
        waited_s = 0.0
        for begun, ended in reversed(self.ends):
            if begun < moment:
                break
            waited_s += ended - begun
        return waited_s

    def set_up(self) -> AbstractContextManager[None]:
        """Inside, passes are none of a step."""
        return self.labelled(SETUP)

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Inside, that is the label of what passes send."""
        self._label = label
        try:
            yield
        finally:
            self._label = ""

    def label(self, own: str) -> str:
        """Of what a pass sends, which in a step is `own`."""
        return self._label or own


def sleep_until(moment: float) -> float:
    """A moment of `time.perf_counter`. Returns by how much it was still ahead; negative if it had passed."""
    ahead = moment - time.perf_counter()
    if ahead > 0:
        time.sleep(ahead)
    return ahead
