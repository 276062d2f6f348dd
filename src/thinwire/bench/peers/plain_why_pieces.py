"""What the scripts plain_why_*.py share: a model that is paced by sleeping, examples, the seconds of each step.

No thinwire here.

    python plain_why_X.py '{"blocks": 8, "width": 128, "forward_s": 0.004, ...}'

A block sleeps `forward_s` in its forward pass and twice as long in its backward pass, times `slow` on the rank `slow_rank`. The
data loader sleeps `load_s` for a batch. Rank 0 writes the seconds of each step to `out`.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

DEFAULTS = {"blocks": 8, "width": 128, "forward_s": 0.006, "slow_rank": -1, "slow": 1.0, "load_s": 0.0, "workers": 0}
DEFAULTS |= {"steps": 60, "out": "", "bucket_mb": 25, "overlap": False, "batch": 2}


def settings():
    """From the command line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return DEFAULTS | json.loads(sys.argv[1])


class _Pause(torch.autograd.Function):
    @staticmethod
    def forward(context, values, seconds):
        context.seconds = seconds
        time.sleep(seconds)
        return values.view_as(values)

    @staticmethod
    def backward(context, gradient):
        time.sleep(2 * context.seconds)
        return gradient, None


class Block(nn.Module):
    """[n, width] -> [n, width]."""

    def __init__(self, width, seconds):
        super().__init__()
        self.linear, self.seconds = nn.Linear(width, width), seconds

    def forward(self, values):
        return _Pause.apply(torch.tanh(self.linear(values)), self.seconds)


def model(chosen, rank):
    """The blocks one after another."""
    seconds = chosen["forward_s"] * (chosen["slow"] if rank == chosen["slow_rank"] else 1.0)
    return nn.Sequential(*(Block(chosen["width"], seconds) for _ in range(chosen["blocks"])))


class Examples(torch.utils.data.Dataset):
    """Vectors, which take a while to load."""

    def __init__(self, chosen):
        self.chosen = chosen

    def __len__(self):
        return self.chosen["steps"] * self.chosen["batch"] * 8

    def __getitem__(self, index):
        if self.chosen["load_s"]:
            time.sleep(self.chosen["load_s"] / self.chosen["batch"])
        return torch.randn(self.chosen["width"], generator=torch.Generator().manual_seed(index))


def loader(chosen, **options):
    """Over `Examples`."""
    workers = chosen["workers"]
    more = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    return torch.utils.data.DataLoader(Examples(chosen), batch_size=chosen["batch"], num_workers=workers, **more, **options)


class Steps:
    """When each step ended. `finish` writes the seconds of each, and a sum over the parameters that shows any changed bit."""

    def __init__(self, chosen):
        self.chosen, self.moments = chosen, []

    def over(self):
        """A step is."""
        self.moments.append(time.perf_counter())
        return len(self.moments) >= self.chosen["steps"]

    def finish(self, parameters):
        """Rank 0 writes."""
        if dist.get_rank() == 0 and self.chosen["out"]:
            seconds = [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]
            with torch.no_grad():
                bits = [int(one.contiguous().view(torch.int32).to(torch.int64).sum()) for one in parameters]
            Path(self.chosen["out"]).write_text(json.dumps({"seconds": seconds, "bits": bits}))
        # Whoever drops the last group holds the interpreter while it waits for gloo's threads, and these may still want it, to
        # drop tensors of calls that are over: then the script never ends (seen with torch 2.13).
        time.sleep(0.2)
