"""Ranks of a benchmark, in the lab or over loopback: started, waited for, ended if one fails; what they leave; their progress.

Rank 0 appends its progress to a file and a thread shows it on stderr: ranks in a lab share nothing else with who started them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from thinwire.cluster import Cluster
from thinwire.endings import signals_unwind
from thinwire.errors import UserError
from thinwire.lab.commands import processes_for
from thinwire.lab.run import RESULTS, LabOptions, launch
from thinwire.record import Card

TIMEOUT_S = 900.0
POLL_S = 0.5
QUIET_S = 2.0
"""After which it is said, where no bar shows it, that something still goes on; then after twice as long, and so on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """results: what the ranks wrote, by the name of the file without .json; the others: as the lab reports them."""

    results: dict[str, Any]
    delay: str = "none"
    cards: tuple[Card, ...] = ()
    retransmitted: Mapping[str, int] = field(default_factory=dict)


def run_script(
    where: Cluster | int,
    script: str,
    settings: Mapping[str, Any],
    lab: LabOptions | None = None,
    *,
    title: str = "",
    prefix: Sequence[str] = (),
    timeout_s: float = TIMEOUT_S,
) -> Outcome:
    """Run a script of `thinwire.bench.peers` on each rank; see `run_commands`. Its progress is shown, by default under its name.

    settings: what JSON can hold; prefix: what goes before the command.
    """
    with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
        progress = Path(folder) / "progress"
        text = json.dumps({**settings, "progress": str(progress)})
        command = [*prefix, sys.executable, "-m", "thinwire.bench.peers.rank", script, RESULTS, text]
        with progress_shown(progress, title or script):
            return run_commands(where, [command], lab, timeout_s)


def run_commands(
    where: Cluster | int, commands: Sequence[Sequence[str]], lab: LabOptions | None = None, timeout_s: float = TIMEOUT_S
) -> Outcome:
    """Run each command on all ranks of a cluster in the lab, or on so many ranks over loopback. UserError if one fails.

    RESULTS in a command stands for the folder whose JSON files come back.
    """
    if isinstance(where, int):
        with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
            run_local([[folder if part == RESULTS else part for part in command] for command in commands], where, timeout_s)
            return Outcome({path.stem: json.loads(path.read_text()) for path in Path(folder).glob("*.json")})
    done = launch(where, [process for command in commands for process in processes_for(where, command)], lab)
    if done.failure:
        raise UserError(f"{where.name}: {done.failure}")
    left = {name.removesuffix(".json"): json.loads(text) for name, text in done.results.items() if name.endswith(".json")}
    return Outcome(left, done.delay, done.cards, done.retransmitted)


def run_local(commands: Sequence[Sequence[str]], world_size: int, timeout_s: float = TIMEOUT_S) -> None:
    """Start each command as `world_size` ranks, all at once, with the variables that launchers set. UserError if one fails.

    No rank outlives the call; one that is ended by SIGTERM or SIGHUP ends them too.
    """
    ranks: list[_Rank] = []
    with signals_unwind():
        try:
            for command in commands:
                port = _free_port()
                ranks.extend(_Rank(["env", *_variables(rank, world_size, port), *command]) for rank in range(world_size))
            _wait(ranks, timeout_s)
        finally:
            for rank in ranks:
                rank.end()


def _variables(rank: int, world_size: int, port: int) -> list[str]:
    names = [
        f"RANK={rank}",
        f"LOCAL_RANK={rank}",
        f"WORLD_SIZE={world_size}",
        f"LOCAL_WORLD_SIZE={world_size}",
        "OMP_NUM_THREADS=1",
    ]
    return [*names, "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}", "GLOO_SOCKET_IFNAME=lo"]


class _Rank:
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


def _wait(ranks: Sequence[_Rank], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while True:
        failed = next((rank for rank in ranks if rank.process.poll()), None)
        if failed is not None:
            raise UserError(f"a rank ended with {failed.process.returncode}: {failed.last_line()}")
        if all(rank.process.returncode == 0 for rank in ranks):
            return
        if time.monotonic() > end:
            raise UserError(f"the ranks did not end in {timeout_s:.0f} s")
        time.sleep(0.1)


def report_progress(path: Path, done: float, total: int, what: str) -> None:
    """Rank 0: `done` of `total` parts are over."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps([done, total, what]) + "\n")


@contextmanager
def progress_shown(path: Path, title: str) -> Iterator[None]:
    """Inside, what ranks report is shown on stderr: as a bar in a terminal; elsewhere each report is a line, and so is that
    something still goes on after `QUIET_S`."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, ended = progress.add_task("starting"), threading.Event()

        def watch() -> None:
            seen, over, what, since, quiet_s = 0, False, "starting", time.monotonic(), QUIET_S
            while not over:
                over = ended.wait(POLL_S)
                text = path.read_text(encoding="utf-8") if path.is_file() else ""
                lines = text.rpartition("\n")[0].splitlines()  # the last one may be half written
                for line in lines[seen:]:
                    done, total, what = json.loads(line)
                    since, quiet_s = time.monotonic(), QUIET_S
                    progress.update(task, completed=done, total=total, description=what)
                    if not console.is_terminal:
                        console.print(f"{title}: {done:.3g} of {total}: {what}", highlight=False, soft_wrap=True)
                seen = len(lines)
                took_s = time.monotonic() - since
                if not (over or console.is_terminal) and took_s >= quiet_s:
                    console.print(f"{title}: {what}: {took_s:.0f} s so far", highlight=False, soft_wrap=True)
                    quiet_s *= 2

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
