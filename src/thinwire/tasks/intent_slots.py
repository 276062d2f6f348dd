"""What a request wants, and which of its words say with what: synthetic requests, composed from the templates below and the names
below, seeded; or a CSV or JSONL with the columns `text`, in which slots stand as [name:words], and `label`, the intent.

Composed are 3,000 requests of five intents and five slots; held-out requests are others than the training ones, of the same
templates and names. Tokens are words, in lower case; what was not seen in training is one token. The model: sentiment's
encoder, one linear layer per word (slots) and one on the mean (intent). Score: the share of requests of which the intent and
every word's slot are right. Baseline: the commonest intent, and of each word its commonest slot. Margin, stated beforehand:
30 points.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.errors import UserError
from thinwire.tasks.examples import ExampleTask, Rows, Tensors
from thinwire.tasks.own import columns_of
from thinwire.tasks.sentiment import LAYERS, WIDTH, TextEncoder
from thinwire.tasks.task import Score
from thinwire.tasks.text import PAD, UNKNOWN, digest_of, padded, split

COUNT, MAX_HELD_OUT, IGNORED = 3000, 500, -100
TEMPLATES = {
    "send": (
        "send {file} to {host}",
        "copy {file} over to {host} {time}",
        "bring {file} to {host}",
        "{host} wants {file}",
    ),
    "measure": ("how fast is the {link} to {host}", "measure {host} {time}", "what does the {link} from {host} carry {time}"),
    "train": ("train {model} on {host}", "start {model} {time}", "let {host} and {host} train {model}", "run {model} {time}"),
    "stop": ("stop {model}", "end what {host} does {time}", "please let {model} rest", "halt {host} {time}"),
    "report": ("show me {model} {time}", "what has {host} done {time}", "how did {model} do on {host}", "report the {link}"),
}
NAMES = {
    "file": ("the log", "last night's checkpoint", "my notes", "the big table", "all photos", "the report of may"),
    "host": ("alpha", "the north rack", "host seven", "berlin", "the old server", "london", "rack two"),
    "link": ("cable", "radio link", "wide area link", "uplink", "fibre"),
    "model": ("the small model", "the translator", "my classifier", "run forty two", "the speech model", "nightly"),
    "time": ("tonight", "at noon", "on friday", "in two hours", "every morning", "since monday"),
}
_SLOT = re.compile(r"\[(\w+):([^\]]+)\]")


class Tagger(nn.Module):
    """forward(words [B, S]) -> [B, S + 1, slots or intents, whichever are more]: of each word, and last of the whole."""

    def __init__(self, encoder: TextEncoder, slots: int, intents: int) -> None:
        super().__init__()
        self.encoder, width = encoder, encoder.embed.embedding_dim
        self.slots, self.intent = nn.Linear(width, slots), nn.Linear(width, intents)

    def forward(self, words: Tensor) -> Tensor:
        found = self.encoder(words)
        mean = found.sum(1, keepdim=True) / (words != PAD).sum(1)[:, None, None].clamp(min=1)
        of_words, of_whole = self.slots(found), self.intent(mean)
        most = max(of_words.shape[2], of_whole.shape[2])
        return torch.cat([F.pad(one, (0, most - one.shape[2])) for one in (of_words, of_whole)], 1)


class IntentSlots(ExampleTask):
    """See the top of the file."""

    item, unit = "request", "nats per request"
    score_is = Score(name="requests understood in full", unit="%", margin=30.0)

    def load(self) -> dict[str, Any]:
        if self.config.task.source:
            found, about = columns_of(Path(self.config.task.source).expanduser(), ("text", "label"))
        else:
            found, about = composed(), {"source": "synthetic requests, composed from templates", "files": 0, "bytes": 0}
        self._requests = [(*slots_of(text), label) for text, label in found]
        self._parts = dict(zip(("train", "held_out"), split(len(found), MAX_HELD_OUT), strict=True))
        training = [self._requests[row] for row in self._parts["train"].tolist()]
        words = sorted({word for sentence, _, _ in training for word in sentence})
        self._words = {word: number for number, word in enumerate(words, start=UNKNOWN + 1)}
        self.slots = sorted({slot for _, slots, _ in self._requests for slot in slots})
        self.intents = sorted({label for _, _, label in self._requests})
        self.num_train, self.num_held_out = (len(rows) for rows in self._parts.values())
        return {**about, "documents": len(found), "sha256": digest_of(f"{text}\t{label}" for text, label in found)}

    def build(self) -> nn.Module:
        width, layers = self.config.task.width or WIDTH, self.config.task.layers or LAYERS
        encoder = TextEncoder(len(self._words) + UNKNOWN + 1, width, layers, self.config.train.sequence + 8)
        return Tagger(encoder, len(self.slots), len(self.intents))

    def examples(self, part: str, rows: Rows) -> Tensors:
        chosen = [self._requests[row] for row in self._parts[part][rows].tolist()]
        words = padded([self._tokens(sentence) for sentence, _, _ in chosen])
        slots = torch.full_like(words, IGNORED)
        for row, (_, found, _) in enumerate(chosen):
            kept = found[: self.config.train.sequence]
            slots[row, : len(kept)] = torch.tensor([self.slots.index(slot) for slot in kept])
        return words, slots, torch.tensor([self.intents.index(label) for _, _, label in chosen])

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        words, slots, intents = batch
        found = model(words)
        of_words = F.cross_entropy(found[:, :-1, : len(self.slots)].flatten(0, 1), slots.flatten(), ignore_index=IGNORED)
        return of_words + F.cross_entropy(found[:, -1, : len(self.intents)], intents)

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        words, slots, intents = batch
        of_words, of_whole = self._understood(model, words)
        right = ((of_words == slots) | (slots == IGNORED)).all(1) & (of_whole == intents)
        return float(right.sum()), float(len(intents))

    def baseline(self) -> tuple[str, float]:
        training = [self._requests[row] for row in self._parts["train"].tolist()]
        intent = Counter(label for _, _, label in training).most_common(1)[0][0]
        slots: dict[str, Counter[str]] = {}
        for sentence, found, _ in training:
            for word, slot in zip(sentence, found, strict=True):
                slots.setdefault(word, Counter())[slot] += 1
        usual = {word: counted.most_common(1)[0][0] for word, counted in slots.items()}
        held = [self._requests[row] for row in self._parts["held_out"].tolist()]
        right = [label == intent and [usual.get(word, "") for word in sentence] == found for sentence, found, label in held]
        return "the commonest intent and slots", 100.0 * sum(right) / len(right)

    def predict(self, model: nn.Module, given: str) -> str:
        sentence = given.lower().split()[: self.config.train.sequence]
        if not sentence:
            raise UserError("the request is empty; give some words")
        tokens = padded([self._tokens(sentence)]).to(next(model.parameters()).device)
        slots, intents = self._understood(model, tokens)
        named = [self.slots[number] for number in slots[0, : len(sentence)].tolist()]
        together = groupby(zip(sentence, named, strict=True), itemgetter(1))
        groups = ((slot, " ".join(word for word, _ in its)) for slot, its in together)
        said = " ".join(words if slot == "-" else f"[{slot}:{words}]" for slot, words in groups)
        return f"{self.intents[int(intents[0])]}: {said}"

    def shown(self, model: nn.Module, count: int) -> list[str]:
        held = [self._requests[row] for row in self._parts["held_out"][:count].tolist()]
        return [f"{label} wanted; {self.predict(model, ' '.join(sentence))}" for sentence, _, label in held]

    def _understood(self, model: nn.Module, words: Tensor) -> tuple[Tensor, Tensor]:
        found = model(words)
        return found[:, :-1, : len(self.slots)].argmax(2), found[:, -1, : len(self.intents)].argmax(1)

    def _tokens(self, sentence: Sequence[str]) -> list[int]:
        return [self._words.get(word, UNKNOWN) for word in sentence[: self.config.train.sequence]]


def composed(count: int = COUNT, seed: int = 20) -> list[tuple[str, ...]]:
    """(text with slots, intent), all different."""
    chosen, found = random.Random(seed), dict[tuple[str, ...], None]()
    while len(found) < count:
        intent = chosen.choice(list(TEMPLATES))
        text = re.sub(r"\{(\w+)\}", lambda m: f"[{m[1]}:{chosen.choice(NAMES[m[1]])}]", chosen.choice(TEMPLATES[intent]))
        found.setdefault((chosen.choice(("", "", "now ", "hello ", "then ")) + text, intent))
    return list(found)


def slots_of(text: str) -> tuple[list[str], list[str]]:
    """Its words in lower case, and of each its slot, "-" of none."""
    words, slots, end = list[str](), list[str](), 0

    def add(part: str, slot: str) -> None:
        words.extend(part.lower().split())
        slots.extend([slot] * len(part.split()))

    for match in _SLOT.finditer(text):
        add(text[end : match.start()], "-")
        add(match[2], match[1])
        end = match.end()
    add(text[end:], "-")
    return words, slots
