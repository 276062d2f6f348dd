"""What a synchroniser that acts between replicas leaves to the one within them (`inner`)."""

from contextlib import AbstractContextManager

from thinwire.sync.base import Synchroniser


class NestedSynchroniser:
    """A replica may itself be several ranks, which `inner` holds together on other axes; its steps are the inner one's."""

    replicas_differ = True

    def __init__(self, inner: Synchroniser) -> None:
        self.inner = inner

    @property
    def ready_at(self) -> float:
        """The inner one's."""
        return self.inner.ready_at

    @property
    def num_micro(self) -> int:
        """Micro-batches of a step."""
        return self.inner.num_micro

    @property
    def settled_after(self) -> int:
        """The inner one's."""
        return self.inner.settled_after

    def rehearsal(self) -> AbstractContextManager[None]:
        """The inner one's."""
        return self.inner.rehearsal()

    def microbatch(self, last: bool) -> AbstractContextManager[None]:
        """The inner one's."""
        return self.inner.microbatch(last)
