"""Plain PyTorch: DistributedDataParallel over gloo with its own defaults. No thinwire in this process.

    python plain_ddp.py MODEL_FILE RESULTS '{"width": ...}'

Each turn trains `steps` steps with the exchange and `steps` without any; seconds of a step are written at the end.

Contenders take turns in one run, so that a machine whose speed drifts is fair to all. All contenders' ranks are started at once.
A number in a file is whose turn it is; while it is not theirs, the ranks of a contender wait in a barrier of their own group, and
its rank 0 looks at the file.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

POLL_S = 0.01
TIMEOUT_S = 600.0


class Turns:
    """One per rank. index: which contender this is, of `contenders`; barrier: of the contender's own ranks."""

    def __init__(self, folder, index, contenders, rank, barrier):
        self.file = Path(folder) / "turn"
        self.index, self.contenders, self.rank, self.barrier = index, contenders, rank, barrier
        self.taken = 0

    def begin(self):
        """Wait for this contender's next turn. Every rank calls."""
        mine = self.taken * self.contenders + self.index
        started = time.monotonic()
        while self.rank == 0 and self._now() < mine:
            if time.monotonic() - started > TIMEOUT_S:
                raise TimeoutError(f"turn {mine} did not come in {TIMEOUT_S:.0f} s; another contender has failed")
            time.sleep(POLL_S)
        self.barrier()

    def end(self):
        """Hand over. Every rank calls."""
        self.barrier()
        self.taken += 1
        if self.rank == 0:
            aside = self.file.with_suffix(".tmp")
            aside.write_text(str(self._now() + 1))
            os.replace(aside, self.file)

    def _now(self):
        return int(self.file.read_text()) if self.file.exists() else 0


def take_turns(index, results, settings, kinds):
    """{kind: seconds of a step in each turn}, and the processor's of the first. kinds: what trains `steps` steps, by name."""
    turns, steps = Turns(results, index, 2, dist.get_rank(), dist.barrier), settings["steps"]
    found = {name: [] for name in (*kinds, "processor")}
    for turn in range(settings["turns"] + 1):
        turns.begin()
        for number, (kind, train) in enumerate(kinds.items()):
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            train()
            dist.barrier()
            if turn:  # the first one warms up
                found[kind].append((time.perf_counter() - started) / steps)
                if number == 0:
                    found["processor"].append((time.process_time() - used) / steps)
        turns.end()
    return found


def main(model_file, results, settings):
    """One rank."""
    settings = json.loads(settings)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    address = f"tcp://{os.environ['MASTER_ADDR']}:{settings['port'] or os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location("transformer", model_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Transformer(SimpleNamespace(**settings["model"]))
    replica = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    shape = (settings["micro_batch"], settings["model"]["context"])
    tokens = torch.randint(settings["model"]["vocabulary"], shape, generator=torch.Generator().manual_seed(rank))

    def train():
        for _ in range(settings["steps"]):
            replica(tokens, tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    def train_alone():
        with replica.no_sync():
            train()

    found = take_turns(0, results, settings, {"exchange": train, "no_exchange": train_alone})
    assert not any(name.startswith("thinwire") for name in sys.modules)
    if rank == 0:
        (Path(results) / "plain_ddp.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
