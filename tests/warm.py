"""Commands without the seconds that every process spends on loading torch: forked from a server that has it loaded.

`Warm` is a `subprocess.Popen` for `python -m thinwire ...` and other programs: modules of ours or of torch, and scripts. What it
starts is a process as real as any: with its own id, session, folder, environment, pipes, signals and exit code. What such a
command starts in turn, ranks above all, is forked from the same server. Three things differ from a cold start: modules are
imported already, all processes share one seed of str hashes, and static C++ objects are not destroyed at the end. A few tests
therefore start cold.

A caller in other namespaces, so one on a host of a lab, gets its process there: see `warm_labs`.

A request is a JSON object and the three standard streams on a Unix socket; the answers are the process id and, at the end, the
exit code.
"""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import inspect
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from pool import start_server

SOCKET = "THINWIRE_TEST_WARM"
"""The variable that tells a command, and its ranks, where the server listens."""

MOST_DESCRIPTORS = 8
"""That may be handed over beside the standard streams."""

PYTHON = sys.executable
COMMAND = [PYTHON, "-m", "thinwire"]


def program(argv: list[str], environment: Mapping[str, str]) -> tuple[list[str], Mapping[str, str]] | None:
    """What follows `python`, "-m" and a module or a script, and the environment; None for anything else. Sees through `env`."""
    if argv[0] == "env":
        end = 1 + next((index for index, word in enumerate(argv[1:]) if "=" not in word), len(argv) - 1)
        environment, argv = {**environment, **dict(word.split("=", 1) for word in argv[1:end])}, argv[end:]
    if argv[:1] != [PYTHON]:
        return None
    words = [*argv[2 if argv[1:2] == ["-u"] else 1 :], "", ""]
    script = Path(words[0])
    plain = script.name.startswith("plain_")  # one of the benchmarks' peers, which must find nothing of ours loaded
    known = words[1].partition(".")[0] in ("thinwire", "torch") if words[0] == "-m" else script.suffix == ".py" and not plain
    return (words[:-2], environment) if known else None


@functools.cache
def server() -> str:
    """The address of the server, which is started at the first call and ends with this process."""
    folder = tempfile.mkdtemp(prefix="warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(Path(folder) / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    process = start_server().Process(target=_serve, args=(listener,), daemon=True, name="warm commands")
    process.start()
    listener.close()
    return path


@contextlib.contextmanager
def warm_labs() -> Iterator[None]:
    """Meanwhile what is a `program` on the hosts of labs is forked from the server. What is not starts as usual."""
    path = Path(server()).parent / "python"
    path.write_text(f'#!/bin/sh\nexec "{PYTHON}" -E -S "{__file__}" "$@"\n')
    path.chmod(0o755)
    with patch.dict(os.environ, {SOCKET: server()}), patch.object(sys, "executable", str(path)):
        yield


class Warm(subprocess.Popen[str]):
    """`subprocess.Popen`; if it is to run a `program` and its environment names a server, forked from that."""

    _arguments_of = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
    _line: socket.socket | None = None

    def _execute_child(self, *arguments: Any) -> None:
        told = self._arguments_of.bind(self, *arguments).arguments
        words = [told["args"]] if isinstance(told["args"], str | os.PathLike) else told["args"]
        found = program([os.fspath(word) for word in words], os.environ if told["env"] is None else told["env"])
        if found is None or SOCKET not in found[1]:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        argv, environment = found
        request = {
            "arguments": argv,
            "cwd": os.fspath(told["cwd"] or os.getcwd()),
            "environment": dict(environment),
            "session": next(bool(value) for name, value in told.items() if name.endswith("start_new_session")),
            "descriptors": sorted(told["pass_fds"]),
        }
        streams = [told["p2cread"], told["c2pwrite"], told["errwrite"]]
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(environment[SOCKET])
        message = json.dumps(request).encode()
        handed = [*(fd if fd != -1 else i for i, fd in enumerate(streams)), *request["descriptors"]]
        socket.send_fds(self._line, [len(message).to_bytes(4, "little")], handed)
        self._line.sendall(message)
        self.pid = _receive_integer(self._line)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(told[name] for name in pipes))  # type: ignore[attr-defined]

    def _internal_poll(self, *arguments: Any, **named: Any) -> int | None:
        if self._line is None:
            return super()._internal_poll(*arguments, **named)  # type: ignore[misc, no-any-return]
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self._end()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._line is None:
            return super()._wait(timeout)  # type: ignore[misc, no-any-return]
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self._end()
        return self.returncode

    def _end(self) -> None:
        assert self._line is not None
        self.returncode = _receive_integer(self._line)
        self._line.close()


def _receive_integer(line: socket.socket) -> int:
    received = line.recv(8, socket.MSG_WAITALL)
    assert len(received) == 8, "the server of warm commands has ended"
    return int.from_bytes(received, "little", signed=True)


def _send_integer(line: socket.socket, value: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody waits for it any more
        line.sendall(value.to_bytes(8, "little", signed=True))


def _serve(listener: socket.socket) -> None:
    """One process for each request, which forks the command and waits for its end. Ends with the tests."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while parent.sentinel not in select.select([listener, parent.sentinel], [], [])[0]:
        line, _ = listener.accept()
        if os.fork():
            line.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        header, streams, *_ = socket.recv_fds(line, 4, 3 + MOST_DESCRIPTORS)
        request = json.loads(line.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL))
        if sys.platform == "linux":
            _enter_namespaces(*struct.unpack("i8x", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))
        pid = os.fork()
        if pid == 0:
            _send_integer(line, os.getpid())  # as its own namespace counts
            line.close()
            _become(request, streams)
        for stream in streams:
            os.close(stream)
        _send_integer(line, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)


def _enter_namespaces(pid: int) -> None:
    """Those of the caller that are not this process's own: the next child of this process is where the caller is."""
    libc = ctypes.CDLL(None, use_errno=True)
    kinds = ("user", "ipc", "uts", "net", "pid", "mnt")
    theirs = {kind: os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in kinds}
    ours = {kind: os.stat(f"/proc/self/ns/{kind}") for kind in kinds}
    for kind, descriptor in theirs.items():
        if os.path.samestat(os.fstat(descriptor), ours[kind]):
            continue
        if libc.setns(descriptor, 0) != 0:
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


def _become(request: Mapping[str, Any], streams: list[int]) -> NoReturn:
    """Be `python ARGUMENTS` from here to the end."""
    code: object = 1
    try:
        if request["session"]:
            os.setsid()
        numbers = [0, 1, 2, *request["descriptors"]]
        apart = [fcntl.fcntl(stream, fcntl.F_DUPFD, max(numbers) + 1) for stream in streams]  # out of each other's way
        for stream in streams:
            os.close(stream)
        for stream, number in zip(apart, numbers, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 - to the end of the process
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        tests = str(Path(__file__).parent)
        sys.path[:] = [request["cwd"], *(folder for folder in sys.path if not folder.startswith(tests))]
        is_module = request["arguments"][0] == "-m"
        sys.argv[:] = request["arguments"][is_module:]
        Path("/proc/self/comm").write_text(_name(sys.argv))
        _settle()
        if not is_module:
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            if "." in sys.argv[0]:
                sys.modules.pop(sys.argv[0], None)  # it was loaded beforehand; now it is the program
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _name(argv: list[str]) -> str:
    """What tests find it by, as /proc/PID/environ and cmdline still show the server's: "rank1", or "replica 1"."""
    if "RANK" in os.environ:
        return f"rank{os.environ['RANK']}"
    return " ".join(argv[1:3]) if argv[0].endswith(".replica_roles") else Path(argv[0]).name


def _settle() -> None:
    """What was read from the environment as torch was loaded; and how this process starts others."""
    import torch
    import torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler as handler

    handler.Popen = subprocess.Popen = Warm  # type: ignore[misc, assignment]
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _main() -> None:
    """The `python` of `warm_labs`. Signals are passed on; the exit code is that of the program."""
    argv = [PYTHON, *sys.argv[1:]]
    if program(argv, os.environ) is None or SOCKET not in os.environ or argv[1:3] == ["-m", "thinwire.lab.inside"]:
        os.execv(PYTHON, argv)
    handed = [int(os.environ["PMI_FD"])] if "PMI_FD" in os.environ else []  # over which mpiexec speaks to its ranks
    process = Warm(argv, pass_fds=handed, start_new_session=True)
    forwarded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in forwarded:
        signal.signal(number, lambda received, _: os.kill(process.pid, received))
    code = process.wait()
    if code < 0:
        for number in forwarded:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    _main()
