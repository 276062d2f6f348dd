"""What one process of `thinwire replicas` does: serve a range of the weights, or train as a replica.

    python -m thinwire.train.replica_roles server NUMBER SPEC.json DESCRIPTOR
    python -m thinwire.train.replica_roles replica NUMBER SPEC.json

DESCRIPTOR is of the socket that the launcher has made for this server to listen on. A process ends when its standard input does:
whatever has killed the launcher, nobody is left behind. A line "gone NAME" there tells a server that this replica will not come
again, and "end" asks it to finish.
"""

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import DiLoCo, Service
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.measure.compute import find_device, shared_gpus
from thinwire.sync.server.authentication import read_secret
from thinwire.sync.server.connection import PeerLost
from thinwire.sync.server.listener import Listener
from thinwire.sync.server.server import Event, Server
from thinwire.sync.server.snapshots import Snapshots, load, save
from thinwire.sync.server.weights import load_optimizers
from thinwire.sync.server.worker import AsyncDiLoCo, ParameterServerWorker
from thinwire.train.optimizers import make_optimizer
from thinwire.train.replica_serve import run_all
from thinwire.train.step import learning_rate
from thinwire.train.task import LanguageModel

LOST, USER_ERROR = 1, 2


class Spec(BaseModel):
    """What the launcher tells all it starts. folder: of the run; cache: of the text.

    addresses: of the servers, in order. versions: of the snapshots with which they go on; None: they begin anew.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    addresses: list[str]
    versions: list[int] | None
    folder: Path
    cache: Path
    replicas: int
    run: RunConfig
    service: Service

    def task(self) -> LanguageModel:
        """The text and the model; replicas share the text as data ranks do."""
        return LanguageModel(self.run, Layout(data=self.replicas), self.cache)

    def file(self, role: str, number: int, suffix: str) -> Path:
        """What a server or replica leaves behind."""
        return self.folder / f"{role}-{number}.{suffix}"

    @property
    def secret_file(self) -> Path:
        """Of this run alone."""
        return self.folder / "replicas-secret"

    @property
    def store(self) -> str:
        """Where replicas find the servers."""
        return ",".join(self.addresses)


def serve(spec: Spec, index: int, listener: socket.socket) -> int:
    """Be server `index`, and return the exit code; goes on from its file if there is one."""
    load_optimizers()
    ledger, service = Ledger(), spec.service
    kept = Snapshots(spec.folder, index, service)
    server = Server(service, index, ledger, on_event=_tell(index), snapshots=kept)
    if spec.versions:
        server.load_state_dict(kept.load(spec.versions[index]))
    end = threading.Event()
    threading.Thread(target=_listen, args=(end, server), daemon=True).start()
    accepting = Listener(listener, read_secret(spec.secret_file), service, {index: server})
    code = run_all({f"the listener of server {index}": accepting.run, f"server {index}": server.run}, end)
    _write(spec.file("server", index, "json"), server.report() | {"ledger": ledger.entries(index)})
    return code


def replicate(spec: Spec, number: int) -> None:
    """Be replica `number`: join, train until the servers have merged what all steps have in tokens, leave.

    The learning rate follows what is merged: train.steps times that part, and the local steps since.
    """
    run, task, name = spec.run, spec.task(), f"r{number}"
    device = find_device(number)
    if number == 0 and (line := shared_gpus(spec.replicas)):
        print(line, flush=True)
    model = task.build_model().to(device)
    optimizer = make_optimizer(model, run.train)
    kept = spec.file("replica", number, "pt")
    tokens = task.workload.tokens_per_microbatch * run.sync.accumulate
    joined: AsyncDiLoCo | ParameterServerWorker
    if isinstance(spec.service.merge, DiLoCo):
        joined = AsyncDiLoCo(model, optimizer, store=spec.store, name=name, tokens_per_step=tokens, secret_file=spec.secret_file)
    else:
        joined = ParameterServerWorker(model, store=spec.store, name=name, secret_file=spec.secret_file)
    owes = spec.service.push.feeds_back
    if owes and kept.is_file():
        joined.load_state_dict(load(kept))
    with joined as worker:
        first, pushed = worker.first_step, 0
        for step in worker.remaining_steps():
            loss = _backward(spec, task, model, (step, number), worker.alive)
            if run.train.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.clip)
            at = round(run.train.steps * worker.client.progress) + step - worker.first_step
            rate = learning_rate(run.train, min(at, run.train.steps - 1))
            if isinstance(worker, AsyncDiLoCo):
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
                new_pushes = worker.pushes
            else:
                worker.step(samples=tokens, learning_rate=rate)
                new_pushes = (step + 1) // 50
            if owes and new_pushes > pushed:
                save(worker.state_dict(), kept)
                pushed = new_pushes
            if (step + 1) % run.train.log_every == 0:
                merged = f"{worker.client.progress:.0%} of the run merged"
                print(f"replica {number}  step {step + 1}  {merged}  loss {float(loss):.4f}\n", end="", flush=True)
    client = worker.client
    about = {"replica": number, "first_step": first, "steps": client.step, "ledger": client.ledger.entries(number)}
    _write(spec.file("replica", number, "json"), about)


def _backward(
    spec: Spec, task: LanguageModel, model: torch.nn.Module, place: tuple[int, int], alive: Callable[[], None]
) -> torch.Tensor:
    """The loss, []. place: step and number of the replica. alive: called with each micro-batch."""
    (step, number), losses, num_micro = place, [], spec.run.sync.accumulate
    for micro in range(num_micro):
        alive()
        loss = task.loss(model, task.batch(step, micro * spec.replicas + number)) / num_micro
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _tell(index: int) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        print(f"server {index}  {event.line()}\n", end="", flush=True)

    return tell


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _listen(end: threading.Event, server: Server | None = None) -> None:
    """Do what the launcher says; leave at once when it is gone."""
    while line := sys.stdin.readline().split():
        if line[0] == "end":
            end.set()
            return
        if line[0] == "gone" and server is not None:
            server.merger.never_comes(line[1])
    os._exit(LOST)


def main() -> int:
    """See the top of the file."""
    role, number, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher, which then ends us
    torch.set_num_threads(1)
    spec = Spec.model_validate_json(path.read_text(encoding="utf-8"))
    try:
        if role == "server":
            return serve(spec, number, socket.socket(fileno=int(sys.argv[4])))
        threading.Thread(target=_listen, args=(threading.Event(),), daemon=True).start()
        replicate(spec, number)
    except PeerLost as error:
        print(f"{role} {number}: {error}", file=sys.stderr, flush=True)
        return LOST
    except UserError as error:
        print(f"thinwire: error: {role} {number}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # not through the interpreter's end, where threads may wait for peers that are gone
