"""The same steps as plain_ddp.py through thinwire: metered backend, our synchroniser, our step, one summary a turn."""

import time
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.bench.peers.rank import make_stepper
from thinwire.bench.turns import Turns
from thinwire.collectives.metered_calls import all_reduce
from thinwire.config.model import ModelConfig
from thinwire.config.run import EveryStep, TrainSection
from thinwire.models.transformer import Transformer
from thinwire.sync.every_step import EveryStepSync


def measure(rank):
    """Seconds and processor seconds of a step, in each turn."""
    settings, place = rank.settings, rank.place
    mesh = init_device_mesh("cpu", (place.world_size,), mesh_dim_names=("data",))
    torch.manual_seed(0)
    config = ModelConfig(**settings["model"])
    model = Transformer(config)
    train = TrainSection(micro_batch=settings["micro_batch"], sequence=config.context)
    sync = EveryStepSync(EveryStep(bucket_bytes=settings["bucket_bytes"]), "data", rank.ledger)
    shape = (settings["micro_batch"], config.context)
    tokens = torch.randint(config.vocabulary, shape, generator=torch.Generator().manual_seed(place.rank))
    found = {"exchange": [], "processor": []}
    with ExitStack() as stack:
        stepper = make_stepper(stack, model, sync, mesh, train, lambda trained, batch: trained(batch, batch))
        stepper.rehearse(tokens)
        turns = Turns(rank.results, 1, 2, place.rank, dist.barrier)
        for turn in range(settings["turns"] + 1):
            turns.begin()
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            for step in range(settings["steps"]):
                stepper.run(step, [tokens], 1)
            summary = torch.zeros(2 + place.world_size, dtype=torch.float64)
            all_reduce(summary, mesh.get_group("data"), rank.ledger, "summary").wait()
            dist.barrier()
            if turn:  # the first one warms up
                found["exchange"].append((time.perf_counter() - started) / settings["steps"])
                found["processor"].append((time.process_time() - used) / settings["steps"])
            turns.end()
    return found
