"""Start the processes of all hosts and stay with them until the last has ended. Runs in process 1 of a lab.

When one fails, the others get `notice_s` to notice, then are ended. A signal from outside is passed to all; they get
`grace_s` to end cleanly, a second signal ends them at once. When the pipe from outside closes, everything ends at once.
"""

import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from thinwire.lab.spaces import Space

KILL_AFTER_S = 2.0
LOOK_S = 0.1
TAIL_LINES = 20
LINE_BYTES = 4096
OWN_ERROR = b"thinwire: error: "


class Running:
    """One started process: its exit code once it has one, and the last lines that it wrote to stderr and stdout."""

    def __init__(self, spec: dict[str, Any], space: Space, cwd: str) -> None:
        self.host: str = spec["host"]
        self.streams: bool = spec["streams"]
        self.code: int | None = None
        self.lines: dict[str, deque[bytes]] = {name: deque([b""], TAIL_LINES) for name in ("stderr", "stdout")}

        def enter() -> None:
            space.enter()
            os.chdir(cwd)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)

        self.popen = subprocess.Popen(
            spec["argv"],
            stdin=subprocess.DEVNULL,
            stdout=None if self.streams else subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=enter,
        )

    def keep(self, name: str, chunk: bytes) -> None:
        """Keep the last lines; stderr of the first process goes on to the terminal, less the error that the lab prints last."""
        if self.streams:
            shown = b"".join(line for line in chunk.splitlines(keepends=True) if not line.startswith(OWN_ERROR))
            try:
                os.write(2, shown)
            except OSError:
                self.streams = False
        first, *others = chunk.split(b"\n")
        self.lines[name][-1] = (self.lines[name][-1] + first)[-LINE_BYTES:]
        self.lines[name].extend(others)

    def last_line(self) -> str:
        """Our own first error, since a launcher and the ranks that it ends print more after it; without one the last line."""
        for line in self.lines["stderr"]:
            if line.startswith(OWN_ERROR):
                return line.decode(errors="replace").strip()
        for name in ("stderr", "stdout"):
            for line in reversed(self.lines[name]):
                text = line.decode(errors="replace").strip().rsplit("\r", 1)[-1]
                if any(letter.isalnum() for letter in text):
                    return text
        return "no message"

    def send(self, number: int) -> None:
        if self.code is None:
            try:
                os.killpg(self.popen.pid, number)
            except ProcessLookupError:
                os.kill(self.popen.pid, number)


class Watch:
    """Wait for all processes. `failures` are those that failed by themselves, in order; `signal` what came from outside."""

    def __init__(self, processes: list[Running], control: int, notice_s: float, grace_s: float) -> None:
        self.processes = processes
        self.failures: list[Running] = []
        self.signal: int | None = None
        self._notice_s, self._grace_s, self._control = notice_s, grace_s, control
        self._deadline, self._ending = float("inf"), False
        self._selector = selectors.DefaultSelector()
        self._timed: deque[tuple[float, Callable[[], None]]] = deque()
        self._clock_from: Path | None = None
        self._clock = 0.0

    def run(self, timed: Sequence[tuple[float, Callable[[], None]]] = (), clock_from: Path | None = None) -> float:
        """Seconds from now until the last process ended. Ends this process if the pipe from outside closes.

        timed: in order, what to call so many seconds from now, or after the file `clock_from` is there, if a process still runs.
        """
        self._timed, self._clock_from = deque(timed), clock_from
        started = self._clock = time.monotonic()
        self._selector.register(self._control, selectors.EVENT_READ, "control")
        for process in self.processes:
            self._selector.register(os.pidfd_open(process.popen.pid), selectors.EVENT_READ, process)
            for name in ("stderr", "stdout"):
                if stream := getattr(process.popen, name):
                    os.set_blocking(stream.fileno(), False)
                    self._selector.register(stream, selectors.EVENT_READ, (process, name))
        while any(process.code is None for process in self.processes):
            due = min(self._deadline, self._act() if self._timed else self._deadline)
            for key, _ in self._selector.select(min(1.0, max(0.0, due - time.monotonic()))):
                self._on(key)
            if time.monotonic() >= self._deadline:
                self._end()
        seconds = time.monotonic() - started
        while unread := [key for key, _ in self._selector.select(0) if isinstance(key.data, tuple)]:
            for key in unread:
                self._on(key)
        return seconds

    def _act(self) -> float:
        """Do what is due; returns when to look again."""
        if self._clock_from is not None:
            if not self._clock_from.exists():
                return time.monotonic() + LOOK_S
            self._clock, self._clock_from = time.monotonic(), None
        while self._timed and time.monotonic() >= self._clock + self._timed[0][0]:
            self._timed.popleft()[1]()
        return self._clock + self._timed[0][0] if self._timed else self._deadline

    def _on(self, key: selectors.SelectorKey) -> None:
        if isinstance(key.data, Running):
            self._selector.unregister(key.fileobj)
            self._on_end(key.data)
            return
        try:
            chunk = os.read(key.fd, 65536)
        except BlockingIOError:
            return
        if key.data == "control":
            if not chunk:
                os._exit(1)
            for number in chunk:
                self._on_signal(number)
        elif chunk:
            process, name = key.data
            process.keep(name, chunk)
        else:
            self._selector.unregister(key.fileobj)

    def _on_signal(self, number: int) -> None:
        again = self.signal is not None
        self.signal = number
        self._deadline = time.monotonic() + self._grace_s
        self._ending = True
        for process in self.processes:
            process.send(signal.SIGKILL if again else number)

    def _on_end(self, process: Running) -> None:
        process.code = process.popen.wait()
        if process.code != 0 and not self._ending:
            if not self.failures:
                self._deadline = time.monotonic() + self._notice_s
            self.failures.append(process)

    def _end(self) -> None:
        """The time is up: first ask, then kill."""
        for process in self.processes:
            process.send(signal.SIGKILL if self._ending else signal.SIGTERM)
        self._ending = True
        self._deadline = time.monotonic() + KILL_AFTER_S
