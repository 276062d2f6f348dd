"""One rank of stock FSDP2 on stock gloo, or of the same with `compress_sharded` on the metered backend; otherwise the same lines.

    python -m thinwire.bench.peers.fsdp_contenders time|learn RESULTS '{"name": "stock", ...}'

`time` takes turns with the other contender and paces compute. Pacer keeps a schedule for the whole pass, under which waiting for
the wire would hide for free. So its clock stands still while FSDP2 asks for weights, waits for them or reduces gradients: only
what the wire does during declared compute is hidden. `learn` trains seed after seed and scores the float32 weights.
"""

import functools
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from thinwire import compress_sharded
from thinwire.bench.turns import Turns, write_result
from thinwire.collectives import backend
from thinwire.collectives.ledger import Ledger
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.models.transformer import Transformer
from thinwire.train.optimizers import make_optimizer
from thinwire.train.pace import Pacer
from thinwire.train.runtime import read_environment
from thinwire.train.step import learning_rate
from thinwire.train.task import LanguageModel
from thinwire.workload import Workload

STOCK, OURS = "stock", "ours"
TIMEOUT_S = 900


def shard(model, told, ledger):
    """The only difference between the contenders."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if told["name"] == OURS:
        return compress_sharded(model, told["gradients"], told["weights"], ledger=ledger)
    return None


def take_step(model, optimizer, tokens, targets):
    """One batch, clipped."""
    loss = model(tokens, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def measure_time(told, place, results, ledger):
    """Seconds of a step in each turn, and bytes that the card sent."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    config = ModelConfig(**told["model"])
    torch.manual_seed(0)
    model = Transformer(config)
    compression = shard(model, told, ledger)
    workload = Workload.of_transformer(config, told["micro_batch"], config.context)
    pacer = Pacer.of(workload, told["flops_per_s"])
    for name in ("unshard", "wait_for_unshard", "post_backward"):
        setattr(FSDPParamGroup, name, clock_stands_still(getattr(FSDPParamGroup, name), pacer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    shape = (told["micro_batch"], config.context)
    tokens = torch.randint(config.vocabulary, shape, generator=torch.Generator().manual_seed(place.rank))
    turns = Turns(results, told["index"], 2, place.rank, dist.barrier)
    seconds, card_bytes = [], []
    with pacer.attached(model, workload):
        for turn in range(told["turns"] + 1):
            turns.begin()
            dist.barrier()
            started, sent = time.perf_counter(), card_sent()
            for _ in range(told["steps"]):
                take_step(model, optimizer, tokens, tokens)
            dist.barrier()
            if turn:  # the first one warms up
                seconds.append((time.perf_counter() - started) / told["steps"])
                card_bytes.append((card_sent() - sent) / told["steps"])
            else:
                pacer.declared_s = pacer.late_s = 0.0
            turns.end()
    late = torch.tensor([pacer.missed_fraction])
    dist.all_reduce(late, dist.ReduceOp.MAX)
    memory = compression.memory_bytes if compression else 0
    return {"seconds": seconds, "card_bytes": card_bytes, "late": float(late), "memory_bytes": memory}


def clock_stands_still(method, pacer):
    """`method` as it is, its time left out of the pass that `pacer` paces."""

    @functools.wraps(method)
    def timed(*args, **kwargs):
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            pacer._pass_started += time.perf_counter() - started

    return timed


def card_sent():
    """Bytes that the cards of this host have sent, loopback aside."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    cards = dict(line.split(":", 1) for line in lines)
    return sum(int(counts.split()[8]) for name, counts in cards.items() if name.strip() != "lo")


def measure_loss(told, place, ledger):
    """The held-out loss of each seed."""
    losses = []
    for seed in told["seeds"]:
        config = RunConfig.model_validate({**told["run"], "train": {**told["run"]["train"], "seed": seed}})
        task = LanguageModel(config, Layout(data=place.world_size), read_environment().cache_folder)
        model = task.build_model()
        compression = shard(model, told, ledger)
        optimizer = make_optimizer(model, config.train)
        for step in range(config.train.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.train, step)
            take_step(model, optimizer, *task.batch(step, place.rank))
        if compression:
            compression.detach()
        whole = task.build_model()
        with torch.no_grad():
            for mine, trained in zip(whole.parameters(), model.parameters(), strict=True):
                mine.copy_(trained.full_tensor())
        score = torch.tensor(task.score(whole, place.rank), dtype=torch.float64)
        dist.all_reduce(score)
        losses.append(float(score[0] / score[1]))
    return {"losses": losses}


def main(what, results, settings):
    """One rank."""
    told = json.loads(settings)
    place = read_environment().place
    torch.set_num_threads(1)
    ledger = Ledger()
    backend.register(ledger)
    dist.init_process_group(
        "gloo" if told["name"] == STOCK else backend.NAME,
        init_method=f"tcp://{place.master_address}:{told['port']}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    found = measure_time(told, place, results, ledger) if what == "time" else measure_loss(told, place, ledger)
    if place.rank == 0:
        write_result(results, told["name"], found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
