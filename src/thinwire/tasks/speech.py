"""Which words are said in a recording: digits, days, months and some more (`prompts`), or a user's folder of WAV files
(`recordings`). A transcript that is one word for each recording, such as what a command means, makes it a classifier of speech.

The model hears 40 bands each 10 ms: two 1-D convolutions with batch norm and ReLU, each of which halves the steps; residual
blocks of two more; a linear layer. After each, what lies beyond a recording's end is 0, so that in evaluation nothing depends on
what a recording is batched with. Each 40 ms it gives the likelihood of each unit or of none ("blank"): a word, or a character
where training transcripts have more than MOST_UNITS words.

    loss   -log of the sum over all alignments of the transcript (CTC; Graves et al. 2006), by unit of the transcript
    said   the likeliest unit of each step, without repeats and then without blanks
    score  words right = 1 - edits / words, in %: edits (insert, delete, replace) that make of what is said the transcript
           (the word error rate, from 100 %)

Baseline: the commonest transcript each time. Margin, stated beforehand: 60 points.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.tasks.examples import ExampleTask, Rows, Tensors, of_arrays
from thinwire.tasks.prompts import load_prompts
from thinwire.tasks.recordings import BANDS, log_mel, read_wav, recordings_of
from thinwire.tasks.task import Score
from thinwire.tasks.text import padded, split

WIDTH, LAYERS, KERNEL = 96, 3, 5
BLANK, MOST_UNITS, MULTIPLE = 0, 1000, 16


class Block(nn.Module):
    """forward(bands [B, width, steps], steps of each [B]) -> [B, width, steps]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)

    def forward(self, bands: Tensor, steps: Tensor) -> Tensor:
        return _within(bands + self.second(_within(self.first(bands), steps)), steps)


class Listener(nn.Module):
    """forward(bands [B, BANDS, steps], steps of each [B]) -> logits [B, steps / 4, 1 + units]."""

    def __init__(self, units: int, width: int, layers: int) -> None:
        super().__init__()
        self.shorter = nn.ModuleList([_convolution(BANDS, width, 2), _convolution(width, width, 2)])
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 1 + units)

    def forward(self, bands: Tensor, steps: Tensor) -> Tensor:
        for layer in self.shorter:
            steps = halved(steps)
            bands = _within(layer(bands), steps)
        for block in self.blocks:
            bands = block(bands, steps)
        logits: Tensor = self.head(bands.transpose(1, 2))
        return logits


class Speech(ExampleTask):
    """See the top of the file. A batch: bands, steps of each, units padded with BLANK, rows."""

    item, unit = "recording", "nats per word"
    score_is = Score(name="words right", unit="%", margin=60.0)

    def load(self) -> dict[str, Any]:
        if self.config.task.source:
            self._seen, self._texts, about = own_recordings(Path(self.config.task.source).expanduser())
        else:
            self._seen, self._texts, about = load_prompts(self.cache_folder)
        words = {word for text in self._texts["train"] for word in text.split()}
        self._by_word = len(words) <= MOST_UNITS
        self.units = sorted(words) if self._by_word else sorted(set("".join(self._texts["train"])))
        self._number = {unit: number for number, unit in enumerate(self.units, start=BLANK + 1)}
        self.num_train, self.num_held_out = (len(self._texts[part]) for part in ("train", "held_out"))
        return about

    def build(self) -> nn.Module:
        return Listener(len(self.units), self.config.task.width or WIDTH, self.config.task.layers or LAYERS)

    def examples(self, part: str, rows: Rows) -> Tensors:
        texts = [self._texts[part][row] for row in rows.tolist()]
        apart = [text.split() if self._by_word else list(text) for text in texts]
        units = [[self._number[one] for one in each if one in self._number] for each in apart]
        return *batched([self._seen[part][row] for row in rows.tolist()]), padded(units, 1), torch.from_numpy(rows)

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        bands, steps, units, _ = batch
        logits = model(bands, steps)
        likely = logits.log_softmax(2, torch.promote_types(logits.dtype, torch.float32)).transpose(0, 1)
        return F.ctc_loss(likely, units, halved(halved(steps)), (units != BLANK).sum(1), blank=BLANK, zero_infinity=True)

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        return _counted(self.said(model, *batch[:2]), [self._texts["held_out"][row] for row in batch[3].tolist()])

    def baseline(self) -> tuple[str, float]:
        usual = Counter(self._texts["train"]).most_common(1)[0][0]
        held = self._texts["held_out"]
        return f"always {usual!r}", self.measured_score(_counted([usual] * len(held), held))

    @torch.no_grad()
    def said(self, model: nn.Module, bands: Tensor, steps: Tensor) -> list[str]:
        """The text of each recording of a batch."""
        likeliest, texts = model(bands, steps).argmax(2).tolist(), []
        for row, count in zip(likeliest, halved(halved(steps)).tolist(), strict=True):
            before = [BLANK, *row[: count - 1]]
            kept = [self.units[one - 1] for one, last in zip(row[:count], before, strict=True) if one not in (BLANK, last)]
            texts.append((" " if self._by_word else "").join(kept))
        return texts

    def predict(self, model: nn.Module, given: str) -> str:
        return self._heard(model, log_mel(*read_wav(Path(given).expanduser())))

    def shown(self, model: nn.Module, count: int) -> list[str]:
        rows = [place * self.num_held_out // count for place in range(min(count, self.num_held_out))]
        return [f"said: {self._texts['held_out'][row]}; heard: {self._heard(model, self._seen['held_out'][row])}" for row in rows]

    def _heard(self, model: nn.Module, seen: Tensor) -> str:
        like = next(model.parameters())
        bands, steps = batched([seen])
        return self.said(model, bands.to(like), steps.to(like.device))[0] or "nothing"


def own_recordings(folder: Path) -> tuple[dict[str, list[Tensor]], dict[str, list[str]], dict[str, Any]]:
    """As `load_prompts`, of a user's folder; texts in lower case. Every tenth recording is held out, of few every second."""
    named, about = recordings_of(folder)
    samples = [read_wav(path) for path, _ in named]
    texts = [" ".join(text.lower().split()) for _, text in named]
    digest = of_arrays(*(one for one, _ in samples), torch.tensor(list("\n".join(texts).encode())).numpy())
    parts = dict(zip(("train", "held_out"), split(len(named), len(named)), strict=True))
    seen = {part: [log_mel(*samples[row]) for row in rows.tolist()] for part, rows in parts.items()}
    said = {part: [texts[row] for row in rows.tolist()] for part, rows in parts.items()}
    return seen, said, {**about, "documents": len(named), "sha256": digest}


def batched(seen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bands [B, BANDS, steps], 0 beyond each one's end, steps a multiple of MULTIPLE; and steps of each, int64 [B]."""
    steps = torch.tensor([len(one) for one in seen])
    bands = torch.zeros(len(seen), BANDS, -(-int(steps.max()) // MULTIPLE) * MULTIPLE)
    for row, one in enumerate(seen):
        bands[row, :, : len(one)] = one.T
    return bands, steps


def halved(steps: Tensor) -> Tensor:
    """What a convolution of stride 2 leaves."""
    return (steps + 1) // 2


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """With batch norm: [B, inputs, steps] -> [B, outputs, steps / stride], rounded up."""
    return nn.Sequential(nn.Conv1d(inputs, outputs, KERNEL, stride, KERNEL // 2, bias=False), nn.BatchNorm1d(outputs))


def _within(bands: Tensor, steps: Tensor) -> Tensor:
    """After a ReLU, and 0 beyond each one's end."""
    return F.relu(bands) * (torch.arange(bands.shape[2], device=bands.device) < steps[:, None])[:, None]


def edits(said: Sequence[str], wanted: Sequence[str]) -> int:
    """The fewest insertions, deletions and replacements (Levenshtein 1966)."""
    row = list(range(len(wanted) + 1))
    for number, one in enumerate(said, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(wanted, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (one != other))
    return row[-1]


def _counted(said: Sequence[str], wanted: Sequence[str]) -> tuple[float, float]:
    """Words less edits, and words."""
    counts = [(len(text.split()), edits(mine.split(), text.split())) for mine, text in zip(said, wanted, strict=True)]
    return float(sum(words - wrong for words, wrong in counts)), float(sum(words for words, _ in counts))
