"""The command line as a user starts it: a process of its own, its output, and what it leaves running.

`cold=True` starts a new interpreter; otherwise the process is forked from one that has torch loaded (`warm`).
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from warm import COMMAND, SOCKET, Warm, server

MARK = "THINWIRE_TEST_MARK"

TINY_RUN = """
[model]
layers = 1
width = 16
heads = 2
context = 32
[data]
source = "text.txt"
cache = "cache"
[train]
micro_batch = 1
sequence = 32
log_every = 1
eval_every = 0
eval_tokens = 64
"""
"""A run.toml whose steps take milliseconds, on text.txt; ends within [train], for more of it."""


def thinwire(
    *arguments: str, cwd: Path, timeout_s: float = 50, cold: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `thinwire ARGUMENTS` to its end."""
    with started(*arguments, cwd=cwd, cold=cold, **variables) as process:
        out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@contextmanager
def started(*arguments: str, cwd: Path, cold: bool = False, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """`thinwire ARGUMENTS` as a process group of its own; whatever is left of it is ended afterwards."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {MARK: f"{os.getpid()}-{cwd.name}", "COLUMNS": "200"} | variables
    if not cold:
        environment[SOCKET] = server()
    process = Warm(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def running(cwd: Path) -> list[int]:
    """Processes of this test: they carry its mark in their environment, or, not started cold, are in its folder."""
    mark, folder = f"{MARK}={os.getpid()}-{cwd.name}".encode(), cwd.resolve()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").readlink() == folder or mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def nothing_left(cwd: Path, patience_s: float = 20) -> bool:
    """True once no process of the test remains."""
    end = time.monotonic() + patience_s
    while running(cwd):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def ranks_of(cwd: Path) -> dict[int, int]:
    """Rank -> process id, of the ranks that run."""
    found = {}
    for pid in running(cwd):
        variables = dict(pair.split(b"=", 1) for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in pair)
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if b"RANK" in variables:
            found[int(variables[b"RANK"])] = pid
        elif name.startswith("rank"):  # a warm one
            found[int(name.removeprefix("rank"))] = pid
    return found


def one_line(text: str) -> str:
    """The error that was printed: exactly one line on stderr."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    assert lines[0].startswith("thinwire: error: "), text
    return lines[0].removeprefix("thinwire: error: ")
