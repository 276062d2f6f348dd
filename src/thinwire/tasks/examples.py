"""A task on examples that are independent of each other: what all of the catalogue have in common.

A step takes the next B = micro_batch * accumulate * replicas training examples of an order that is drawn anew each epoch; of them
micro-batch j has those from j b to (j + 1) b, b = micro_batch. An epoch ends when no full step is left. So a step trains on the
same examples however many ranks share it, and a run resumes at any step.

Batch norm. While training each micro-batch is normalised by its own mean and variance, and nothing is noted. For the score the
statistics of the whole are wanted:

    mean, variance = their means over the first `SETTLING` micro-batches of the seed, with the weights that are to be scored

which every replica computes alike, so that nothing is sent, and replicas stay equal to the bit (Wu and Johnson 2021,
arXiv 2105.07576, "precise" batch norm). One rank that trains on as many micro-batches gets the same.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig
from thinwire.data.loader import key_of, permute
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.tasks.costs import workload_of
from thinwire.tasks.task import Score
from thinwire.workload import Workload

SETTLING = 16
Rows = NDArray[np.int64]
Tensors = tuple[Tensor, ...]


class ExampleTask(ABC):
    """See the top of the file. A subclass is one task: `load` reads its data, and sets `num_train` and `num_held_out`."""

    unit = "nats per example"
    item = "example"
    shape: ModelConfig | None = None
    score_is: Score
    num_measured = 2
    """How many sums `measure` gives: as a rule (right, counted)."""

    items_each = 1
    """Of an example: what `workload` counts."""
    num_train: int
    num_held_out: int

    def __init__(self, config: RunConfig, layout: Layout, cache_folder: Path) -> None:
        """cache_folder: unless data.cache names one. UserError for data that are not there, or too few."""
        self.config, self.layout = config, layout
        self.cache_folder = Path(config.data.cache).expanduser() if config.data.cache else cache_folder
        self.data = self.load()
        self._num_micro = config.sync.accumulate * layout.replicas
        self._global_batch = config.train.micro_batch * self._num_micro
        if self._global_batch > self.num_train or not self.num_held_out:
            raise UserError(
                f"task.kind = {config.task.kind!r} has {self.num_train} training and {self.num_held_out} held-out examples, and "
                f"a step takes {self._global_batch}; give more data or a smaller train.micro_batch"
            )
        self.sha256 = str(self.data["sha256"])
        self.num_sums = 2 + self.num_measured

    @abstractmethod
    def load(self) -> dict[str, Any]:
        """Read the data; what record.json says of them: source, files, documents, bytes, sha256, licence. UserError, one line."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model, in float32 on the CPU; its weights drawn from torch's generator, which is seeded."""

    @abstractmethod
    def examples(self, part: str, rows: Rows) -> Tensors:
        """A batch of these rows of "train" or "held_out", each tensor with them in dim 0; floats as float32."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Mean over the batch, []. Batch on the model's device, in its dtype."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        """Sums over a held-out batch, `num_measured` of them, from which `measured_score` follows."""

    @abstractmethod
    def baseline(self) -> tuple[str, float]:
        """What a trivial method is called, and its score on the held-out part."""

    @abstractmethod
    def predict(self, model: nn.Module, given: str) -> str:
        """What the model, in evaluation mode, says of an input: a text, or the path of a file. UserError for what is neither."""

    def measured_score(self, sums: Sequence[float]) -> float:
        """Of sums over all held-out examples: as a rule the percentage."""
        return 100.0 * sums[0] / sums[1] if sums[1] else float("nan")

    def picture(self, model: nn.Module, given: str) -> str:
        """As of any Task."""
        return ""

    def shown(self, model: nn.Module, count: int) -> list[str]:
        """Some held-out examples beside what the model, in evaluation mode, says of them, for people. Nothing unless it knows."""
        return []

    @cached_property
    def workload(self) -> Workload:
        """Counted on the first micro-batch; a forward and a backward pass."""
        model, batch = self.build().double(), self.batch(0, 0)
        items = self.config.train.micro_batch * self.items_each
        return workload_of(model, lambda: self.loss(model, batch), items, self.config.model.dtype)

    def build_model(self) -> nn.Module:
        """As of any Task: rounded to model.dtype."""
        torch.manual_seed(self.config.train.seed)
        model = self.build().to(getattr(torch, self.config.model.dtype))
        for norm in _norms(model):
            norm.momentum = 0.0
        return model

    def batch(self, step: int, index: int) -> Tensors:
        """As of any Task."""
        return self.examples("train", self._rows(step, index))

    def loss(self, model: nn.Module, batch: Tensors) -> Tensor:
        """As of any Task."""
        return self.losses(model, _on_device_of(model, batch))

    @property
    def scored_rows(self) -> Rows:
        """Of the held-out part: at most train.eval_tokens, spread evenly."""
        count = min(self.num_held_out, self.config.train.eval_tokens)
        return np.arange(count, dtype=np.int64) * self.num_held_out // count

    def held_out(self, replica: int) -> Iterator[tuple[Tensors, int]]:
        """Every `replicas`-th batch of what is scored."""
        rows, size = self.scored_rows, self.config.train.micro_batch
        for first in range(replica * size, len(rows), size * self.layout.replicas):
            chosen = rows[first : first + size]
            yield self.examples("held_out", chosen), len(chosen)

    @torch.no_grad()
    def score(self, model: nn.Module, replica: int) -> tuple[float, ...]:
        """As of any Task."""
        self.settle(model)
        sums, was_training = np.zeros(self.num_sums), model.training
        model.eval()
        for batch, count in self.held_out(replica):
            placed = _on_device_of(model, batch)
            sums += np.array([float(self.losses(model, placed)) * count, count, *self.measure(model, placed)])
        model.train(was_training)
        return tuple(sums.tolist())

    def score_of(self, sums: Sequence[float]) -> float:
        """As of any Task."""
        return self.measured_score(sums[2:])

    def describe(self) -> dict[str, Any]:
        """As of any Task."""
        name, score = self.baseline()
        is_, baseline = self.score_is, {"name": name, "score": score}
        return {
            "item": self.item,
            "data": {"skipped": "", **self.data, "examples": self.num_train, "held_out": self.num_held_out},
            "score": {"name": is_.name, "unit": is_.unit, "higher": is_.higher, "margin": is_.margin, "baseline": baseline},
        }

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Give batch norms the statistics of the whole; see the top of the file."""
        norms = _norms(model)
        if not norms:
            return
        was_training = model.training
        model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all
        for place in range(min(SETTLING, self.num_train // self.config.train.micro_batch)):
            self.loss(model, self.examples("train", self._drawn(place * self.config.train.micro_batch, 0)))
        for norm in norms:
            norm.momentum = 0.0
        model.train(was_training)

    def _rows(self, step: int, index: int) -> Rows:
        epoch, place = divmod(step, self.num_train // self._global_batch)
        return self._drawn(place * self._global_batch + index * self.config.train.micro_batch, epoch)

    def _drawn(self, first: int, epoch: int) -> Rows:
        """A micro-batch from that place in the order of the epoch."""
        index = np.arange(first, first + self.config.train.micro_batch, dtype=np.int64)
        return permute(index, self.num_train, key_of(self.config.train.seed, epoch))


def of_arrays(*arrays: Any) -> str:
    """The sha256 of their values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _on_device_of(model: nn.Module, batch: Tensors) -> Tensors:
    """Floats in the model's dtype too."""
    like = next(model.parameters())
    return tuple(one.to(like.device, like.dtype if one.is_floating_point() else one.dtype) for one in batch)
