"""Plain PyTorch: DistributedDataParallel over gloo with its own defaults. No thinwire in this process.

    python plain_ddp.py MODEL_FILE TURNS_FILE RESULTS '{"width": ...}'

Each turn trains `steps` steps with the exchange and `steps` without any; seconds of a step are written at the end.
"""

import importlib.util
import json
import os
import sys
import time
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
    told = json.loads(settings)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{os.environ['MASTER_ADDR']}:{told['port']}",
        rank=rank,
        world_size=world_size,
    )
    torch.manual_seed(0)
    model = load("transformer", model_file).Transformer(SimpleNamespace(**told["model"]))
    replica = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    shape = (told["micro_batch"], told["model"]["context"])
    tokens = torch.randint(told["model"]["vocabulary"], shape, generator=torch.Generator().manual_seed(rank))

    def step():
        replica(tokens, tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    turns = load("turns", turns_file).Turns(results, told["index"], told["contenders"], rank, dist.barrier)
    seconds = {"exchange": [], "no_exchange": []}
    processor = []
    for turn in range(told["turns"] + 1):
        turns.begin()
        for kind in seconds:
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            for _ in range(told["steps"]):
                if kind == "exchange":
                    step()
                else:
                    with replica.no_sync():
                        step()
            dist.barrier()
            if turn:  # the first one warms up
                seconds[kind].append((time.perf_counter() - started) / told["steps"])
                if kind == "exchange":
                    processor.append((time.process_time() - used) / told["steps"])
        turns.end()
    assert not any(name.startswith("thinwire") for name in sys.modules)
    if rank == 0:
        load("turns", turns_file).write_result(results, "plain", {**seconds, "processor": processor})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
