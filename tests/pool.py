"""Persistent pools of ranks for tests: real processes, a real gloo group behind the meter, on loopback.

Starting processes and a process group takes seconds, a test on them milliseconds, so the ranks are forked once (from a
server that has torch loaded) and then run one test function after another. A rank that raises, dies or hangs takes the
whole pool with it; the next call starts a new one, so that no test sees what another one broke.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.distributed.elastic.multiprocessing",
    "torch.distributed.launcher.api",
    "torch.distributed.run",
    "torch.nn.parallel",
    "torch.utils.tensorboard",
    "thinwire.bench.peers.rank",
    "thinwire.bench.peers.sync_contenders",
    "thinwire.bench.sync",
    "thinwire.cli.report",
    "thinwire.cli.main",
    "thinwire.horovod.torch",
    "thinwire.measure.probe",
    "thinwire.report",
    "thinwire.train.agent",
    "thinwire.train.replica_launch",
    "thinwire.train.replica_roles",
    "thinwire.train.worker",
    "hypothesis",
    "pytest",
]
"""Loaded once by the server from which ranks and commands are forked: what they and the tests' own modules import."""

MAX_GROUPS, MAX_THREADS = 40, 150
"""Groups that a pool may hold, each with sockets and threads on every rank, and threads of its first rank, before it is started
anew. Groups that a test made cannot all be destroyed after it: DTensor keeps meshes, and so their groups, in its caches, and
what a test has left in a cycle keeps others that torch does not list any more."""

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


@dataclass
class Rank:
    """What a test function gets on each rank: its place, the default group's ledger, and what it held before this call."""

    rank: int
    world_size: int
    ledger: Any
    before: Any

    def recorded(self) -> Any:
        """What this rank has entered into the ledger since the function began: {Call: Total}."""
        from thinwire.collectives.ledger import difference

        return difference(self.ledger.snapshot(), self.before)


class Pool:
    """`world_size` ranks, started at the first `run`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: Any = None
        self._num_groups = self._num_threads = 0
        self._output: Any = None

    @property
    def pids(self) -> list[int]:
        """The processes of the pool as it runs now; empty before the first call and after a failure."""
        return [process.pid for process in self._processes if process.pid is not None]

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """Call the module-level `function(Rank, *args)` on every rank; the results by rank. RankFailure if one fails."""
        try:
            if self._num_groups > MAX_GROUPS or self._num_threads > MAX_THREADS:
                self.close()
            if not self._processes:
                self._start()
            message = pickle.dumps((function, args))
            for pipe in self._pipes:
                pipe.send_bytes(message)
            return self._replies(function.__name__, timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the ranks and wait until they are gone."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        if self._output is not None:
            self._output.close()
        self._output = None
        self._processes, self._pipes, self._store = [], [], None
        self._num_groups = self._num_threads = 0

    def _start(self) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._output = tempfile.NamedTemporaryFile(prefix="ranks-")  # noqa: SIM115 - lives as long as the pool
        context = start_server()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            place = (rank, self.world_size, self._store.port, self._output.name)
            process = context.Process(target=_serve, args=(theirs, *place), daemon=True, name=f"rank {rank}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._replies("start", 60.0)

    def _replies(self, what: str, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        failures: list[str] = []
        waiting = list(range(self.world_size))
        while waiting:
            ready = wait([self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank in waiting if self._pipes[rank] in ready]:
                waiting.remove(rank)
                try:
                    good, results[rank], self._num_groups = pickle.loads(self._pipes[rank].recv_bytes())
                    self._num_threads = num_threads(self._processes[rank].pid)
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(5)
                    code = self._processes[rank].exitcode
                    failures.insert(0, f"rank {rank} of {self.world_size} died, exit code {code}")
                    continue
                if not good:
                    failures.append(f"rank {rank} of {self.world_size} failed\n{results[rank]}")
            if failures:  # a moment for the others: that their peer has left is not the news
                deadline = min(deadline, time.monotonic() + 0.2)
        if waiting and not failures:
            failures.append(f"ranks {waiting} of {self.world_size} gave no answer in {timeout_s:g} s")
        if failures:
            printed = Path(self._output.name).read_text(errors="replace")[-2000:]
            raise RankFailure(f"{what}: {failures[0]}" + (f"\nprinted by the ranks:\n{printed}" if printed else ""))
        return [results[rank] for rank in range(self.world_size)]


def start_server() -> Any:
    """Start the server that forks ranks, if it does not run yet; it loads torch meanwhile. Returns the context."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
    return context


def num_threads(pid: int | None) -> int:
    """Of a process, those that Python does not know too; 0 where the system does not say."""
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0


def _serve(pipe: Connection, rank: int, world_size: int, port: int, output: str) -> None:
    """One rank: join the group, then run what arrives until the pipe closes or the parent is gone."""
    printed = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK

    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    from thinwire.collectives.backend import NAME, register
    from thinwire.collectives.ledger import SETUP_STEP, Ledger

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    ledger = Ledger()
    register(ledger)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(NAME, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    pipe.send_bytes(pickle.dumps((True, None, 1)))
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        torch.manual_seed(0)
        ledger.step = SETUP_STEP
        ledger.axes.clear()
        ledger._totals.clear()  # a test begins with an empty ledger, as a run does
        ledger.sent_bytes = 0
        try:
            function, args = pickle.loads(message)
            result = function(Rank(rank, world_size, ledger, ledger.snapshot()), *args)
            answer = pickle.dumps((True, result, len(_world.pg_map)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc(), 0))
        pipe.send_bytes(answer)


def _end_with_parent() -> None:
    """A rank that hangs in a collective does not read its pipe; it must end all the same when pytest is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
