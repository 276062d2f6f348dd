"""Starts the servers and the replicas of `thinwire replicas` on this machine, and looks after them.

A replica that dies is started again, at most `restarts` times each, and the others do not stop; of one that is not started again
the servers are told, so that nobody waits for it to join. When a server dies the run is over, and can be resumed: all servers go
on from one version (`thinwire.sync.server.snapshots`). Whatever ends this process, its children read the end of their standard
input and leave.

The servers' sockets, on loopback, are made here and handed over, so their addresses are known before anybody starts. Whoever
speaks with them must know a secret that is made anew for each start, in a file that only this user can read.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from thinwire.config.replicas import Service
from thinwire.config.run import RunConfig
from thinwire.endings import signals_unwind
from thinwire.environment import environment_variables
from thinwire.sync.server.flat import FlatParameters
from thinwire.sync.server.listener import listen, shown
from thinwire.sync.server.snapshots import choose_versions, load
from thinwire.train.replica_roles import USER_ERROR, Spec
from thinwire.train.replica_serve import SERVER_DIED

FAILED = 1
POLL_S = 0.05
END_S = 30.0
"""How long servers may take to write what they hold."""


@dataclass
class _Child:
    role: str
    number: int
    process: subprocess.Popen[str]
    starts: int = 1

    def how(self) -> str:
        """How it ended."""
        code = self.process.returncode
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"{self.role} {self.number} (process {self.process.pid}) {ended}"


@dataclass
class _Run:
    spec: Spec
    path: Path
    restarts: int
    children: list[_Child] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def start(self, role: str, number: int, listener: socket.socket | None = None) -> subprocess.Popen[str]:
        """listener: of a server, which has it from now on."""
        command = [sys.executable, "-m", "thinwire.train.replica_roles", role, str(number), str(self.path)]
        handed = [listener.fileno()] if listener is not None else []
        with environment_variables({"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}):
            return subprocess.Popen([*command, *map(str, handed)], stdin=subprocess.PIPE, text=True, pass_fds=handed)

    def tell_servers(self, line: str) -> None:
        """One that has just died does not hear it."""
        for child in self.children:
            if child.role == "server" and child.process.stdin is not None:
                with suppress(BrokenPipeError):
                    child.process.stdin.write(line + "\n")
                    child.process.stdin.flush()


def launch(config: RunConfig, service: Service, replicas: int, restarts: int, places: tuple[Path, Path]) -> int:
    """Run to the end; returns the exit code, and prints one line when it is not 0. places: the run's folder, the cache's."""
    folder, cache = places
    folder.mkdir(parents=True, exist_ok=True)
    versions = choose_versions(folder, service)
    with ExitStack() as sockets:
        listeners = [sockets.enter_context(listen("127.0.0.1:0", "server")) for _ in range(service.servers)]
        spec = Spec(
            addresses=[shown(listener) for listener in listeners],
            versions=versions,
            folder=folder,
            cache=cache,
            replicas=replicas,
            run=config,
            service=service,
        )
        task = spec.task()  # the text is read once, before everybody reads it
        run = _Run(spec, folder / "replicas-spec.json", restarts)
        run.path.write_text(spec.model_dump_json(indent=1), encoding="utf-8")
        _write_secret(spec.secret_file)
        with _children(run, listeners):
            wrong = _watch(run)
    if wrong is not None:
        line, code = wrong
        print(f"thinwire: error: {line}", file=sys.stderr, flush=True)
        return code
    states = [load(spec.file("server", index, "pt")) for index in range(service.servers)]
    model = task.build_model()
    FlatParameters(model).put(torch.cat([state["weights"]["values"] for state in states]))
    shares = [task.score(model, rank) for rank in range(replicas)]
    held_out = sum(total for total, _ in shares) / sum(count for _, count in shares)
    result = _result(run, states) | {"held_out_loss": held_out, "unit": task.unit}
    (folder / "replicas.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"held-out loss of the servers' weights: {held_out:.4f} {task.unit}; {folder / 'replicas.json'}", flush=True)
    return 0


def _watch(run: _Run) -> tuple[str, int] | None:
    """Until all replicas are done and the servers have ended, or something is wrong: the line and the exit code."""
    waiting = True
    while waiting:
        time.sleep(POLL_S)
        waiting = False
        for child in run.children:
            code = child.process.poll()
            if code is None:
                waiting = waiting or child.role == "replica"
            elif child.role == "server":
                return f"{child.how()}; its last merge is kept, go on with --resume {run.spec.folder}", SERVER_DIED
            elif code == USER_ERROR:
                return f"{child.how()}, see above", USER_ERROR
            elif code and child.starts <= run.restarts:
                run.ended.append(child.how())
                print(f"{child.how()}; started again, {child.starts} of {run.restarts}", flush=True)
                _close(child)
                child.process, child.starts = run.start(child.role, child.number), child.starts + 1
                waiting = True
            elif code and child.how() not in run.ended:
                run.ended.append(child.how())
                print(f"{child.how()}; the others go on", flush=True)
                run.tell_servers(f"gone r{child.number}")
    if not any(child.process.returncode == 0 for child in run.children if child.role == "replica"):
        return f"no replica is left: {run.ended[-1]}; go on with --resume {run.spec.folder}", FAILED
    run.tell_servers("end")
    for child in run.children:
        if child.role == "server" and child.process.wait(END_S):
            return child.how(), SERVER_DIED
    return None


def _write_secret(path: Path) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secrets.token_urlsafe(32) + "\n")


def _result(run: _Run, states: list[dict[str, Any]]) -> dict[str, Any]:
    """What happened, from what everybody has left behind."""
    spec = run.spec
    servers = [json.loads(spec.file("server", index, "json").read_text()) for index in range(spec.service.servers)]
    sent: dict[str, int] = {}
    for server in servers:
        for row in server.pop("ledger"):
            sent[row["label"]] = sent.get(row["label"], 0) + row["wire_bytes"]
    return {
        "steps": states[0]["steps"],
        "restarts": {f"r{child.number}": child.starts - 1 for child in run.children if child.role == "replica"},
        "ended": run.ended,
        "service": spec.service.model_dump(),
        "servers": servers,
        "servers_sent_bytes": sent,
    }


@contextmanager
def _children(run: _Run, listeners: list[socket.socket]) -> Iterator[None]:
    """Start all, and at the end let none live on. listeners: of the servers, whose they are from then on."""
    with signals_unwind():
        try:
            for number, listener in enumerate(listeners):
                run.children.append(_Child("server", number, run.start("server", number, listener)))
                listener.close()
            for number in range(run.spec.replicas):
                run.children.append(_Child("replica", number, run.start("replica", number)))
            yield
        finally:
            for child in run.children:
                child.process.kill()
            for child in run.children:
                child.process.wait()
                _close(child)


def _close(child: _Child) -> None:
    assert child.process.stdin is not None
    child.process.stdin.close()
