"""One thread that does the work of a group in the order in which it was handed in, the same on every rank.

An exchange of several dependent collectives cannot be issued from a callback: callbacks run in whatever order replies arrive,
which differs from rank to rank, and the ranks then wait for each other for ever. Here each job is a plain function that may wait;
the jobs of a group run one after another, on a process group that nobody else uses.
"""

import queue
import threading
from collections.abc import Callable

import torch

_Entry = tuple[Callable[[], torch.Tensor], "torch.futures.Future[torch.Tensor]", Callable[[Exception], None] | None]


class Executor:
    """Jobs are submitted by one thread per rank, in the same order on each rank of the group."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(
        self, job: Callable[[], torch.Tensor], on_error: Callable[[Exception], None] | None = None
    ) -> "torch.futures.Future[torch.Tensor]":
        """Returns at once; the future holds what `job` returns, or its exception, of which `on_error` hears first."""
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._jobs.put((job, future, on_error))
        return future

    def close(self) -> None:
        """Ends the thread after the jobs handed in so far."""
        self._jobs.put(None)
        self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, future, on_error = entry
            try:
                future.set_result(job())
            except Exception as error:
                if on_error:
                    on_error(error)
                future.set_exception(error)  # type: ignore[arg-type]
