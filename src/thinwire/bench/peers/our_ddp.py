"""The same steps as plain_ddp.py through thinwire: metered backend, our synchroniser, our step, one summary a turn.

python our_ddp.py RESULTS '{"width": ...}'
"""

import json
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.bench.turns import Turns, write_result
from thinwire.collectives import backend
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_reduce
from thinwire.config.model import ModelConfig
from thinwire.config.run import EveryStep, TrainSection
from thinwire.models.transformer import Transformer
from thinwire.sync.every_step import EveryStepSync
from thinwire.train.optimizers import make_optimizer
from thinwire.train.runtime import read_environment
from thinwire.train.step import Stepper


def main(results: str, settings: str) -> None:
    """One rank."""
    told = json.loads(settings)
    place = read_environment().place
    assert place is not None
    torch.set_num_threads(1)
    ledger = Ledger()
    backend.register(ledger)
    dist.init_process_group(
        backend.NAME,
        init_method=f"tcp://{place.master_address}:{told['port']}",
        rank=place.rank,
        world_size=place.world_size,
    )
    mesh = init_device_mesh("cpu", (place.world_size,), mesh_dim_names=("data",))
    torch.manual_seed(0)
    config = ModelConfig(**told["model"])
    model = Transformer(config)
    train = TrainSection(micro_batch=told["micro_batch"], sequence=config.context)
    sync = EveryStepSync(EveryStep(bucket_bytes=told["bucket_bytes"]), "data", ledger)
    shape = (told["micro_batch"], config.context)
    tokens = torch.randint(config.vocabulary, shape, generator=torch.Generator().manual_seed(place.rank))
    seconds: list[float] = []
    processor: list[float] = []
    optimizer = make_optimizer(model, train)
    with sync.attached(model, optimizer, mesh) as replica:
        stepper = Stepper(
            model=replica,
            optimizer=optimizer,
            sync=sync,
            loss=lambda trained, batch: trained(batch, batch),
            precision=nullcontext,
            train=train,
        )
        stepper.rehearse(tokens)
        turns = Turns(results, told["index"], told["contenders"], place.rank, dist.barrier)
        for turn in range(told["turns"] + 1):
            turns.begin()
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            for step in range(told["steps"]):
                stepper.run(step, [tokens], 1)
            all_reduce(torch.zeros(2 + place.world_size, dtype=torch.float64), mesh.get_group("data"), ledger, "summary").wait()
            dist.barrier()
            if turn:
                seconds.append((time.perf_counter() - started) / told["steps"])
                processor.append((time.process_time() - used) / told["steps"])
            turns.end()
    if place.rank == 0:
        write_result(results, "ours", {"exchange": seconds, "processor": processor})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
