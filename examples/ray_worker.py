"""A worker function of Ray Train whose gradients travel in four bits: two lines are thinwire's, and one makes room for them.

    pip install thinwire 'ray[train]'
    python examples/ray_worker.py [--workers 2]

The task is to tell ten random patterns apart in noise.
"""

import argparse
import tempfile
from typing import Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire


def train_loop_per_worker(config: dict[str, Any]) -> tuple[float, int]:
    torch.distributed.destroy_process_group()  # Ray's; ours is made of the same ranks, by the variables that Ray has set
    ledger = thinwire.init(collectives="native")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
    thinwire.compress_gradients(model, "int4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    patterns = torch.rand(10, 64)
    draw = torch.Generator().manual_seed(ray.train.get_context().get_world_rank())
    for _ in range(config["steps"]):
        labels = torch.randint(10, (32,), generator=draw)
        images = patterns[labels] + 0.3 * torch.randn(32, 64, generator=draw)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ray.train.report({"loss": loss.item()})
    return loss.item(), ledger.sent_bytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    ray.init(num_cpus=arguments.workers + 1, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"steps": arguments.steps},
            scaling_config=ScalingConfig(num_workers=arguments.workers),
            run_config=RunConfig(storage_path=folder),
        )
        loss, sent_bytes = trainer.fit().return_value
    print(f"loss {loss:.3f}, sent by a worker: {sent_bytes / 1e6:.1f} MB in {arguments.steps} steps")


if __name__ == "__main__":
    main()
