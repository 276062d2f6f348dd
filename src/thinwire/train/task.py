"""The language model as a Task, and how any task is made."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.config.model import ModelConfig
from thinwire.config.run import ModelSection, RunConfig
from thinwire.data.corpus import LARGEST_VOCABULARY, bigram_loss, load_corpus, sample
from thinwire.data.loader import IGNORED, TrainBatches, held_out_batches
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.models.llama import read_weights
from thinwire.models.transformer import Transformer
from thinwire.tasks.catalogue import make_task
from thinwire.tasks.task import Batch, Task
from thinwire.workload import Workload


class LanguageModel:
    """Next-token prediction by a decoder-only transformer on text. cache_folder: for the tokens, unless data.cache names one."""

    item, num_sums, score_is = "token", 2, None

    def __init__(self, config: RunConfig, layout: Layout, cache_folder: Path) -> None:
        self._config, self._layout = config, layout
        train = config.train
        cache = Path(config.data.cache).expanduser() if config.data.cache else cache_folder
        self.corpus = load_corpus(config.data, cache)
        self._num_micro = config.sync.accumulate * layout.replicas
        self._batches = TrainBatches(
            tokens=self.corpus.train,
            sequence=train.sequence,
            global_batch=train.micro_batch * self._num_micro,
            seed=train.seed,
            parts=self.corpus.parts,
            windows=config.data.windows,
        )
        self._held_out = sample(self.corpus.held_out, train.eval_tokens)
        self.shape = shape_with(config.model, self.corpus.vocabulary)
        self.unit, self.sha256 = self.corpus.unit, self.corpus.sha256
        self.workload = Workload.of_transformer(self.shape, train.micro_batch, train.sequence)

    def build_model(self) -> Transformer:
        """The same weights on each rank: drawn from the seed in float32, or model.pretrained's; rounded to model.dtype."""
        torch.manual_seed(self._config.train.seed)
        model = Transformer(self.shape)
        if self._config.model.pretrained:
            read_weights(model, Path(self._config.model.pretrained).expanduser())
        return model.to(getattr(torch, self.shape.dtype))

    def batch(self, step: int, index: int) -> Batch:
        return self._batches.micro_batch(step, index, self._num_micro)

    def samples(self, step: int, index: int) -> list[int]:
        """Of `data.windows`, by number, those that `batch` has."""
        size = self._config.train.micro_batch
        return self._batches.samples(step)[index * size : (index + 1) * size].tolist()

    @property
    def first_steps(self) -> int:
        """In which samples that return come for the first time; 0 where none does."""
        return self._batches.steps_per_epoch if self._config.data.windows else 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = (tensor.to(_device(model)) for tensor in batch)
        return model(inputs, targets)

    def held_out(self, replica: int) -> Iterator[tuple[Batch, int]]:
        """This replica's share of the held-out part: batches with targets, and how many count in each; also those in which none
        does, where ranks need each other's experts."""
        train, replicas, together = self._config.train, self._layout.replicas, self._layout.expert > 1
        for inputs, targets in held_out_batches(self._held_out, train.sequence, train.micro_batch, replica, replicas):
            if (scored := int((targets != IGNORED).sum())) or together:
                yield (inputs, targets), scored

    @torch.no_grad()
    def score(self, model: nn.Module, replica: int) -> tuple[float, float]:
        total, count, device = 0.0, 0, _device(model)
        for (inputs, targets), scored in self.held_out(replica):
            loss = float(model(inputs.to(device), targets.to(device)))
            total += loss * scored if scored else 0.0  # a mean over none is not a number
            count += scored
        return total, float(count)

    def score_of(self, sums: Sequence[float]) -> None:
        """None: the loss is all there is."""

    def settle(self, model: nn.Module) -> None:
        """Nothing."""

    def predict(self, model: nn.Module, given: str) -> str:
        """UserError: there is another command for it."""
        raise UserError("a language model goes on with a text: thinwire generate RUN --prompt TEXT")

    def picture(self, model: nn.Module, given: str) -> str:
        """None."""
        return ""

    def shown(self, model: nn.Module, count: int) -> list[str]:
        """None: `thinwire generate` shows what it writes."""
        return []

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"data": self.corpus.record}
        if self.corpus.vocabulary <= LARGEST_VOCABULARY:
            loss = bigram_loss(self.corpus.train, self._held_out, self.corpus.vocabulary)
            described["baseline"] = {"name": "bigram table", "loss": loss}
        return described


@torch.no_grad()
def shown(task: Task, model: nn.Module, count: int) -> list[str]:
    """As `Task.shown`, of a model in whichever mode, which it is left in."""
    was_training = model.training
    model.eval()
    found = task.shown(model, count)
    model.train(was_training)
    return found


def new_task(config: RunConfig, layout: Layout, cache_folder: Path) -> Task:
    """What [task] asks for, with its data. UserError if they cannot be had."""
    if config.task.is_language_model:
        return LanguageModel(config, layout, cache_folder)
    return make_task(config, layout, cache_folder)


def shape_with(model: ModelSection, vocabulary: int) -> ModelConfig:
    """The model's shape with room for so many tokens. UserError for a pretrained one that has fewer."""
    shape = model.shape()
    if model.pretrained and vocabulary > shape.vocabulary:
        raise UserError(
            f"data.tokenizer has {vocabulary} tokens, and the model of {model.pretrained} knows {shape.vocabulary}; take the "
            "tokenizer that it was trained with, or leave data.tokenizer out"
        )
    return shape.model_copy(update={"vocabulary": max(shape.vocabulary, vocabulary)})


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
