"""Factors of users and items, where a step sends the rows of the users that it saw, exactly, and all else in 4 bits.

    torchrun --nproc-per-node 2 examples/sparse_recommendation.py

Data and score are those of the task `recommendation`: dependencies of Debian packages, or your own pairs (--source). The loop is
plain PyTorch's with one line of thinwire's, and a meter, which says what travelled. A batch follows from step and rank: each rank
knows the rows of the others, and what will be sent.
"""

import argparse
import sys

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.collectives.backend import register
from thinwire.collectives.ledger import Ledger
from thinwire.compress.sparse import rows_bytes
from thinwire.config.run import RunConfig
from thinwire.environment import read_environment
from thinwire.layout import Layout
from thinwire.tasks.catalogue import make_task


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--source", default="")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--compression", default="int4", help="of what is not sparse: int8, int4, ...")
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)
    ledger = Ledger()
    register(ledger)
    dist.init_process_group("thinwire")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    train = {"micro_batch": args.batch, "steps": args.steps, "eval_tokens": 2000}
    config = RunConfig.model_validate({"task": {"kind": "recommendation", "source": args.source}, "train": train})
    task = make_task(config, Layout(data=ranks), read_environment().cache_folder)
    model = task.build_model()
    model.users.sparse = True
    replica = DistributedDataParallel(model)
    thinwire.compress_gradients(replica, args.compression)
    others = [parameter for name, parameter in model.named_parameters() if name != "users.weight"]
    optimizers = [torch.optim.SparseAdam(model.users.parameters(), args.lr), torch.optim.AdamW(others, args.lr)]
    predicted = 0
    for step in range(args.steps):
        users, items = task.batch(step, rank)
        loss = cross_entropy(replica(users), items)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        most = max(len(task.batch(step, other)[0].unique()) for other in range(ranks))
        predicted += rows_bytes(ranks, most, model.users.weight.shape)
        if rank == 0 and (step + 1) % 50 == 0:
            print(f"step {step + 1}/{args.steps}  loss {float(loss.detach()):.3f}", flush=True)

    sent = {"rows": 0, "rest": 0}
    for call, total in ledger.snapshot().items():
        if call.label.startswith("bucket"):
            sent["rows" if call.label.endswith((" counts", " rows")) else "rest"] += total.wire_bytes
    score = task.score_of(task.score(model, 0))
    if rank == 0:
        dense = 2 * (ranks - 1) * model.users.weight.nbytes // ranks
        print(f"rows of users: {sent['rows']:,} bytes sent, {predicted:,} predicted; dense they were {dense * args.steps:,}")
        print(f"all else in {args.compression}: {sent['rest']:,} bytes")
        name, baseline = task.baseline()
        print(f"hit rate at 10: {score:.2f} %; {name}: {baseline:.2f} %")
    dist.destroy_process_group()
    return 0 if sent["rows"] == predicted else 1


if __name__ == "__main__":
    sys.exit(main())
