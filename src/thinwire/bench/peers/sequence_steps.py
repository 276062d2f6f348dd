"""Steps of ranks that share one long sequence, or of one rank with all of it: for `thinwire bench sequence`."""

import resource
import time
from contextlib import ExitStack
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.bench.peers.rank import make_stepper
from thinwire.config.compress import NoCompression
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig, TrainSection
from thinwire.config.sync import EveryStep
from thinwire.layout import AXES, Layout
from thinwire.models.transformer import Transformer
from thinwire.parallel.apply import Asked, apply
from thinwire.sync.make import make_synchroniser


def measure(rank):
    """Seconds of a step, the median, and of all ranks the most bytes of memory and bytes sent."""
    settings, layout = rank.settings, Layout(seq=dist.get_world_size())
    config, length, steps = ModelConfig.model_validate(settings["model"]), settings["sequence"], settings["steps"]
    mesh = init_device_mesh("cpu", layout.of_gradients.degrees, mesh_dim_names=AXES)
    torch.manual_seed(0)
    model = Transformer(config)
    groups = {"seq": dist.new_group()}
    apply(model, Asked(layout=layout, groups=groups, ledger=rank.ledger, config=RunConfig(), keeps=settings["keeps"]))
    tokens = torch.randint(config.vocabulary, (1, length + 1))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    sync = make_synchroniser(EveryStep(), NoCompression(), layout.of_gradients, rank.ledger)
    before, seconds = peak_bytes(), []
    with ExitStack() as stack:
        stepper = make_stepper(stack, model, sync, mesh, TrainSection(steps=steps), lambda model, batch: model(*batch))
        stepper.rehearse(batch)
        sent_before = rank.ledger.sent_bytes
        for step in range(steps):
            dist.barrier()
            begun = time.perf_counter()
            stepper.run(step, [batch], 1)
            seconds.append(time.perf_counter() - begun)
            rank.report(step + 1, steps, f"{seconds[-1]:.2f} s")
    sent = (rank.ledger.sent_bytes - sent_before) // steps
    most = torch.tensor([median(seconds), peak_bytes() - before, sent], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return {"step_s": float(most[0]), "memory_bytes": int(most[1]), "sent_bytes": int(most[2])}


def peak_bytes():
    """The most that this process has had in memory so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
