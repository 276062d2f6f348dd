"""The same steps as plain_ddp.py through thinwire: metered backend, our synchroniser, our step, one summary a turn."""

from contextlib import ExitStack

import torch
from torch.distributed.device_mesh import init_device_mesh

from thinwire.bench.peers.plain_ddp import take_turns
from thinwire.bench.peers.rank import make_stepper
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
    with ExitStack() as stack:
        stepper = make_stepper(stack, model, sync, mesh, train, lambda trained, batch: trained(batch, batch))
        stepper.rehearse(tokens)

        def train_and_sum_up():
            for step in range(settings["steps"]):
                stepper.run(step, [tokens], 1)
            summary = torch.zeros(2 + place.world_size, dtype=torch.float64)
            all_reduce(summary, mesh.get_group("data"), rank.ledger, "summary").wait()

        return take_turns(1, rank.results, settings, {"exchange": train_and_sum_up})
