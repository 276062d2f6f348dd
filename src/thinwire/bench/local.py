"""Ranks on this machine over loopback, for benchmarks that want no lab: started, waited for, ended if one fails."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress

from thinwire.endings import signals_unwind
from thinwire.errors import UserError

PATIENCE_S = 900.0


def run_local(commands: Sequence[Sequence[str]], world_size: int, patience_s: float = PATIENCE_S) -> None:
    """Start each command as `world_size` ranks, all at once, with the variables that launchers set. UserError if one fails.

    No rank outlives the call; one that is ended by SIGTERM or SIGHUP ends them too.
    """
    ranks: list[_Started] = []
    with signals_unwind():
        try:
            for command in commands:
                port = _free_port()
                ranks.extend(_Started(["env", *_variables(rank, world_size, port), *command]) for rank in range(world_size))
            _wait(ranks, patience_s)
        finally:
            for started in ranks:
                started.end()


def _variables(rank: int, world_size: int, port: int) -> list[str]:
    variables = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": 1,
    }
    return [f"{name}={value}" for name, value in variables.items()]


class _Started:
    """One rank, all processes that it starts, and what they wrote to stderr: in a file, which never fills up as a pipe does."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=self._stderr, start_new_session=True)

    def last_line(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines()
        return lines[-1].removeprefix("thinwire: error: ") if lines else "nothing was printed"

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._stderr.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait(ranks: Sequence[_Started], patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while True:
        failed = next((rank for rank in ranks if rank.process.poll()), None)
        if failed is not None:
            raise UserError(f"a rank ended with {failed.process.returncode}: {failed.last_line()}")
        if all(rank.process.returncode == 0 for rank in ranks):
            return
        if time.monotonic() > end:
            raise UserError(f"the ranks did not end in {patience_s:.0f} s")
        time.sleep(0.1)
