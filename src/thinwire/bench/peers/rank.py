"""One rank of a script of this folder: python -m thinwire.bench.peers.rank SCRIPT RESULTS '{"a setting": 1, ...}'

A script has `measure(rank)`; what it returns on rank 0 becomes RESULTS/SCRIPT.json. Before the process group is made,
`register(rank)` of a script may register the backend, or return the name of another; else it is the metered one.
"""

import importlib
import json
import socket
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from thinwire.bench.peers.outside import alone
from thinwire.bench.ranks import report_progress
from thinwire.collectives import backend
from thinwire.collectives.ledger import Ledger
from thinwire.environment import Environment, read_environment, set_variables, shared_gpu_variables
from thinwire.train.optimizers import make_optimizer
from thinwire.train.runtime import process_group
from thinwire.train.step import Stepper

TIMEOUT_S = 900.0


@dataclass
class Rank:
    """What a script gets. results: the folder for what it leaves itself."""

    settings: dict
    results: Path
    environment: Environment = field(default_factory=read_environment)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def place(self):
        return self.environment.place

    def report(self, done, total, what):
        """Of rank 0: how far it is."""
        if self.place.rank == 0:
            report_progress(Path(self.settings["progress"]), done, total, what)


def make_stepper(stack, model, sync, mesh, train, loss):
    """`model` ready to train; it stays attached to `sync` as long as the stack. Collective."""
    optimizer = make_optimizer(model, train)
    attached = stack.enter_context(sync.attached(model, optimizer, mesh))
    return Stepper(model=attached, optimizer=optimizer, sync=sync, loss=loss, precision=nullcontext, train=train)


def agree(value):
    """As rank 0 has it, on all ranks. Collective."""
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def card_bytes():
    """Sent by all cards of this host but loopback; 0 where the system has no such numbers."""
    counters = Path("/proc/net/dev")
    lines = counters.read_text().splitlines()[2:] if counters.is_file() else []
    cards = dict(line.split(":") for line in lines)
    return sum(int(numbers.split()[8]) for name, numbers in cards.items() if name.strip() != "lo")


def main(script, results, settings):
    """Run `script` on this rank."""
    module = importlib.import_module(f"thinwire.bench.peers.{script}")
    torch.set_num_threads(1)
    rank = Rank(json.loads(settings), Path(results))
    name = backend.NAME
    if hasattr(module, "register"):
        name = module.register(rank) or name
    else:
        backend.register(rank.ledger)
    set_variables(shared_gpu_variables(rank.place, torch.cuda.device_count(), socket.gethostname()))
    with process_group(rank.place, name, rank.settings.get("timeout_s", TIMEOUT_S)):
        found = module.measure(rank)
        if found is not None and rank.place.rank == 0:
            (rank.results / f"{script}.json").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    who = json.loads(sys.argv[3]).get("alone")
    if who:
        alone(partial(main, *sys.argv[1:]), who)
    else:
        main(*sys.argv[1:])
