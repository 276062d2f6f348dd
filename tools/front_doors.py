"""Accelerate, Lightning and Transformers' Trainer on one network: their own DDP, our 4 bits, and DiLoCo, at equal tokens.

    thinwire lab run --cluster four-hosts-100mbit --unpaced -- python tools/front_doors.py [DOOR ...] [--steps 100] [--ways int4]

The model has GPT-2 small's twelve layers, narrow enough for two cores. For each it prints the loss over the text, seconds of a
step, and what a rank has sent.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "adapters")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import small_gpt2  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import thinwire  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"compress": "none"},
    "int4": {"compress": "int4"},
    "diloco": {
        "sync": "diloco",
        "every": 5,
        "compress": "int8",
        "outer_learning_rate": 1.0,
        "outer_momentum": 0.0,  # of few short periods, see docs/rarely.md
    },
}
"""The framework's own DDP, and what replaces it."""


def main() -> None:
    """On each rank that the lab, or torchrun, has started."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("doors", nargs="*", default=list(small_gpt2.LOOPS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ways", default=",".join(WAYS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    small_gpt2.SIZES |= {"n_layer": 12, "n_embd": 96, "n_head": 12}
    small_gpt2.RATE["learning_rate"] = 3e-3
    small_gpt2.TEXTS[:] = sorted((ROOT / "docs").glob("*.md"))
    ledger = thinwire.init(collectives="native")
    context = SimpleNamespace(rank=dist.get_rank(), world_size=dist.get_world_size(), ledger=ledger)
    for door in arguments.doors:
        for name in arguments.ways.split(","):
            settings = WAYS[name]
            begun, before = time.perf_counter(), ledger.sent_bytes
            with tempfile.TemporaryDirectory() as folder:
                options = {"save_strategy": "no"} if door == "transformers" else {}
                given = small_gpt2.settings_of(door, settings)
                net, made = small_gpt2.LOOPS[door](context, given, Path(folder), steps=arguments.steps, **options)
            sent = made.ledger.sent_bytes - (before if made.ledger is ledger else 0)
            step_s = (time.perf_counter() - begun) / arguments.steps
            if context.rank == 0:
                loss, parameters = small_gpt2.loss_of(net), sum(one.numel() for one in net.parameters())
                told = f"{door:12}  {name:6}  loss {loss:.4f}  {step_s:.3f} s a step  {sent / 1e6:8.1f} MB sent"
                print(f"{told}  ({parameters:,} parameters)", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
