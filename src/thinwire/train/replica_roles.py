"""What one process of `thinwire replicas` does: serve a range of the weights, or train as a replica.

    python -m thinwire.train.replica_roles server|replica NUMBER SPEC.json

It ends when its standard input does: whatever has killed the launcher, nobody is left behind. The word "end" there asks a server
to finish.
"""

import json
import os
import signal
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
from thinwire.sync.server import saved
from thinwire.sync.server.diloco import AsyncDiLoCo
from thinwire.sync.server.link import PeerLost
from thinwire.sync.server.members import connect
from thinwire.sync.server.server import Event, Server
from thinwire.sync.server.weights import load_optimizers
from thinwire.sync.server.worker import ParameterServerWorker
from thinwire.train.step import learning_rate, make_optimizer
from thinwire.train.task import LanguageModel

LOST, USER_ERROR = 1, 2
CONNECT_S = 30.0


class Spec(BaseModel):
    """What the launcher tells all it starts. folder: of the run; cache: of the text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str
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


def serve(spec: Spec, index: int, end: threading.Event) -> None:
    """Be server `index`; goes on from its file if there is one."""
    load_optimizers()
    ledger = Ledger()
    server = Server(spec.service, connect(spec.address, CONNECT_S), index, ledger, heard=_tell(index))
    kept = spec.file("server", index, "pt")
    if kept.is_file():
        server.merger.load_state_dict(saved.load(kept))
    server.run(end, kept, every=1 if isinstance(spec.service.merge, DiLoCo) else 50)
    _write(spec.file("server", index, "json"), server.report() | {"ledger": ledger.entries(index)})


def replicate(spec: Spec, number: int) -> None:
    """Be replica `number`: join, train until the servers have merged what all steps have in tokens, leave.

    The learning rate follows what is merged: train.steps times that part, and the local steps since.
    """
    run, task, name = spec.run, spec.task(), f"r{number}"
    model = task.build_model()
    optimizer = make_optimizer(model, run.train)
    kept = spec.file("replica", number, "pt")
    tokens = task.workload.tokens_per_microbatch * run.sync.accumulate
    joined: AsyncDiLoCo | ParameterServerWorker
    if isinstance(spec.service.merge, DiLoCo):
        joined = AsyncDiLoCo(model, optimizer, store=spec.address, name=name, tokens_per_step=tokens)
    else:
        joined = ParameterServerWorker(model, store=spec.address, name=name)
    owes = spec.service.push.kind != "none" and spec.service.push.feedback
    if owes and kept.is_file():
        joined.load_state_dict(saved.load(kept))
    with joined as worker:
        first, pushed = worker.first_step, 0
        for step in worker.remaining_steps():
            loss = _backward(spec, task, model, step, number)
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
                saved.save(worker.state_dict(), kept)
                pushed = new_pushes
            if (step + 1) % run.train.log_every == 0:
                merged = f"{worker.client.progress:.0%} of the run merged"
                print(f"replica {number}  step {step + 1}  {merged}  loss {loss:.4f}\n", end="", flush=True)
    client = worker.client
    about = {"replica": number, "first_step": first, "steps": client.step, "ledger": client.ledger.entries(number)}
    _write(spec.file("replica", number, "json"), about)


def _backward(spec: Spec, task: LanguageModel, model: torch.nn.Module, step: int, number: int) -> float:
    total, num_micro = 0.0, spec.run.sync.accumulate
    for micro in range(num_micro):
        loss = task.loss(model, task.batch(step, micro * spec.replicas + number)) / num_micro
        loss.backward()
        total += float(loss.detach())
    return total


def _tell(index: int) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        print(f"server {index}  {event.line()}\n", end="", flush=True)

    return tell


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _listen(end: threading.Event) -> None:
    """Set `end` at the word; leave at once when whoever started us is gone."""
    if sys.stdin.readline().strip() == "end":
        end.set()
        return
    os._exit(LOST)


def main() -> int:
    """See the top of the file."""
    role, number, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher, which then ends us
    torch.set_num_threads(1)
    end = threading.Event()
    threading.Thread(target=_listen, args=(end,), daemon=True).start()
    spec = Spec.model_validate_json(path.read_text(encoding="utf-8"))
    try:
        if role == "server":
            serve(spec, number, end)
        else:
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
