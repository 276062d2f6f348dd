"""One thread that does the work of a group in the order in which it was handed in, the same on every rank.

An exchange of several dependent collectives cannot be issued from a callback: callbacks run in whatever order replies arrive,
which differs from rank to rank, and the ranks then wait for each other for ever. Here each job is a plain function that may wait;
the jobs of a group run one after another, on a process group that nobody else uses.
"""

import queue
import threading
from collections.abc import Callable

import torch


class Executor:
    """Jobs are submitted by one thread per rank, in the same order on each rank of the group."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], torch.Tensor], torch.futures.Future[torch.Tensor]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], torch.Tensor]) -> "torch.futures.Future[torch.Tensor]":
        """Returns at once; the future holds what `job` returns, or its exception."""
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Ends the thread after the jobs handed in so far."""
        self._jobs.put(None)
        self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, future = entry
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)
