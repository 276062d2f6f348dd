"""Ranks on this machine over loopback, for benchmarks that want no lab: started, waited for, ended if one fails."""

import socket
import subprocess
import time
from collections.abc import Sequence

from thinwire.errors import UserError

PATIENCE_S = 900.0


def run_local(commands: Sequence[Sequence[str]], world_size: int, patience_s: float = PATIENCE_S) -> None:
    """Start each command as `world_size` ranks, all at once, with the variables that launchers set. UserError if one fails."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            port = _free_port()
            for rank in range(world_size):
                variables = {
                    "RANK": rank,
                    "WORLD_SIZE": world_size,
                    "LOCAL_RANK": rank,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "GLOO_SOCKET_IFNAME": "lo",
                    "OMP_NUM_THREADS": 1,
                }
                argv = ["env", *(f"{name}={value}" for name, value in variables.items()), *command]
                processes.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        _wait(processes, patience_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stderr:
                process.stderr.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait(processes: Sequence[subprocess.Popen[str]], patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while any(process.poll() is None for process in processes):
        failed = next((process for process in processes if process.poll()), None)
        if failed is not None:
            lines = (failed.stderr.read() if failed.stderr else "").strip().splitlines()
            raise UserError(f"a rank ended with {failed.returncode}: {lines[-1] if lines else 'nothing was printed'}")
        if time.monotonic() > end:
            raise UserError(f"the ranks did not end in {patience_s:.0f} s")
        time.sleep(0.1)
    failed = next((process for process in processes if process.returncode), None)
    if failed is not None:
        raise UserError(f"a rank ended with {failed.returncode}")
