"""Process sets: the ranks among which a call runs."""

from collections.abc import Iterable


class ProcessSet:
    """Ranks of a set, ascending; with a number, `process_set_id`, from `hvd.init` or `hvd.add_process_set` on, until removed."""

    def __init__(self, ranks_or_comm: Iterable[int]) -> None:
        """ValueError for an MPI communicator: name the ranks."""
        try:
            self.ranks: list[int] | None = sorted(int(rank) for rank in ranks_or_comm)
        except TypeError:
            raise ValueError(f"ProcessSet({ranks_or_comm!r}): name its ranks, as in ProcessSet([0, 2])") from None
        self.process_set_id: int | None = None
        self.own_rank = -1
        """Of this process in the world, once there is a number."""

    def size(self) -> int:
        """How many ranks it has. ValueError before it is registered, as all below."""
        return len(self._registered())

    def rank(self) -> int:
        """Of this process within it; -1 where it is not in it."""
        return self._registered().index(self.own_rank) if self.included() else -1

    def included(self) -> bool:
        """Whether this process is in it."""
        return self.own_rank in self._registered()

    def _registered(self) -> list[int]:
        if self.process_set_id is None or self.ranks is None:
            raise ValueError(f"{self} is not registered; call hvd.init and hvd.add_process_set first")
        return self.ranks

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"
