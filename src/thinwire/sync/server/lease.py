"""Who gives the first weights, so that all servers hold one model whoever dies meanwhile.

    lease      server 0 grants it to one live worker at a time, under a number that grows (a fencing token)
    order      that worker gives every other server its range first, and server 0 last: if server 0 has weights, all have
    lost       the lease of a worker that is lost passes to another, which overwrites what the first one left
    number     a server accepts weights only under a higher number than before, so one that was given up meanwhile harms nobody
    wait       all others wait until server 0 has weights

Servers that were loaded with weights grant no lease at all.
"""

import threading

from thinwire.sync.server.merger import Member


class Lease:
    """Of one server. Only server 0's is asked for; every server takes weights by the number under which they come."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: Member | None = None
        self._granted = self._accepted = 0
        self._over = False

    def acquire(self, member: Member, patience_s: float) -> int | None:
        """The number of the lease, once it is this worker's; 0 if there are weights; None if it must wait for longer."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._over or self._holder in (None, member), patience_s):
                return None
            if self._over:
                return 0
            if self._holder is None:
                self._holder, self._granted = member, self._granted + 1
            return self._granted

    def is_held_by(self, member: Member) -> bool:
        """At server 0: this worker's weights are to be taken."""
        with self._changed:
            return self._holder == member

    def accept(self, number: int) -> bool:
        """Weights have come under this number: whether they are to be used."""
        with self._changed:
            if self._over or number <= self._accepted:
                return False
            self._accepted = number
            return True

    def end(self) -> None:
        """There are weights that stay."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def lost(self, member: Member) -> None:
        """Pass it on."""
        with self._changed:
            if self._holder == member:
                self._holder = None
                self._changed.notify_all()
