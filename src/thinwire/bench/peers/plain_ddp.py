"""Plain PyTorch: DistributedDataParallel over gloo with its own defaults. No thinwire in this process.

    python plain_ddp.py MODEL_FILE TURNS_FILE RESULTS '{"width": ...}'

Each turn trains `steps` steps with the exchange and `steps` without any; seconds of a step are written at the end.
"""

import importlib.util
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist


def load(name, path):
    """A module by its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(model_file, turns_file, results, settings):
    """One rank."""
    settings = json.loads(settings)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    address = f"tcp://{os.environ['MASTER_ADDR']}:{settings['port'] or os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = load("transformer", model_file).Transformer(SimpleNamespace(**settings["model"]))
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

    turns = load("turns", turns_file).Turns(results, 0, 2, rank, dist.barrier)
    found = {"exchange": [], "no_exchange": [], "processor": []}
    for turn in range(settings["turns"] + 1):
        turns.begin()
        for kind in ("exchange", "no_exchange"):
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            with replica.no_sync() if kind == "no_exchange" else nullcontext():
                train()
            dist.barrier()
            if turn:  # the first one warms up
                found[kind].append((time.perf_counter() - started) / settings["steps"])
                if kind == "exchange":
                    found["processor"].append((time.process_time() - used) / settings["steps"])
        turns.end()
    assert not any(name.startswith("thinwire") for name in sys.modules)
    if rank == 0:
        (Path(results) / "plain_ddp.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
