"""The next byte of a text, by an LSTM, in large batches (Puri et al. 2018, arXiv 1808.01371): the standard library's sources,
or a text of one's own.

Examples are windows of train.sequence bytes, each from a state of zeros. The model: an embedding, torch's nn.LSTM, one linear
layer. Score: bits per byte, of which fewer are better. Baseline: a table of pairs (`data.corpus`). Margin, stated beforehand:
0.5 bits.

The step's batch is micro_batch * accumulate * ranks; where it is c times as large as the one a learning rate was found for, take
sqrt(c) times that rate, up to where it diverges, and as many steps of warm-up.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.config.data import DataSection
from thinwire.data.corpus import bigram_loss, load_corpus
from thinwire.errors import UserError
from thinwire.tasks.examples import ExampleTask, Rows, Tensors
from thinwire.tasks.task import Score

WIDTH, LAYERS, EMBEDDING = 256, 1, 64
LONGEST_ANSWER = 200


class LSTMModel(nn.Module):
    """forward(tokens [B, S]) -> logits [B, S, vocabulary] of what follows each."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.lstm(self.embed(tokens))[0])
        return found


class LSTMLanguageModel(ExampleTask):
    """See the top of the file."""

    item, unit = "byte", "nats per byte"
    score_is = Score(name="bits per byte", unit="bits", margin=0.5, higher=False)

    def load(self) -> dict[str, Any]:
        source = {"source": self.config.task.source} if self.config.task.source else {}
        self.corpus = load_corpus(DataSection(**source), self.cache_folder)
        self.items_each = length = self.config.train.sequence
        self._bytes = {"train": self.corpus.train, "held_out": self.corpus.held_out}
        self.num_train, self.num_held_out = (max(0, len(one) - 1) // length for one in self._bytes.values())
        return self.corpus.record

    def build(self) -> nn.Module:
        return LSTMModel(self.corpus.vocabulary, self.config.task.width or WIDTH, self.config.task.layers or LAYERS)

    def examples(self, part: str, rows: Rows) -> Tensors:
        places = rows[:, None] * self.config.train.sequence + np.arange(self.config.train.sequence + 1)
        windows = torch.from_numpy(self._bytes[part][places].astype(np.int64))
        return windows[:, :-1], windows[:, 1:]

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        tokens, following = batch
        return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        return float(self.losses(model, batch)) * len(batch[0]), float(len(batch[0]))

    def measured_score(self, sums: Sequence[float]) -> float:
        return sums[0] / sums[1] / math.log(2) if sums[1] else math.nan

    def baseline(self) -> tuple[str, float]:
        tokens, following = self.examples("held_out", self.scored_rows)
        scored = torch.cat((tokens[:, :1], following), 1).flatten().numpy()
        return "a table of pairs", bigram_loss(self.corpus.train, scored, self.corpus.vocabulary) / math.log(2)

    @torch.no_grad()
    def predict(self, model: nn.Module, given: str) -> str:
        if not given:
            raise UserError("the text is empty; give one that is to go on")
        lstm: Any = model
        found, device = list(given.encode()), next(model.parameters()).device
        state, following = None, torch.tensor([found], device=device)
        while len(found) < len(given.encode()) + LONGEST_ANSWER and found[-1]:
            out, state = lstm.lstm(lstm.embed(following), state)
            following = lstm.head(out[:, -1:]).argmax(2)
            found.append(int(following))
        return bytes(found).rstrip(b"\0").decode("utf-8", "replace")
