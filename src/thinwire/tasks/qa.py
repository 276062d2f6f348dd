"""Which words of a text answer a question: questions by rule on verses of the King James Bible, or a CSV or JSONL with the
columns `question`, `text` and `answer`, which the text has word by word.

The rules, for each place of a verse that they fit, X and Y being words with a capital; each asks for both of them:

    X the son (father, wife, servant ...) of Y     Whose son was X?             Who was the son of Y?
    X said (spake, answered) unto Y                To whom did X speak?         Who spoke to Y?
    X begat Y                                      Whom did X beget?            Who begat Y?
    X king of Y                                    Of what was X king?          Who was king of Y?
    X took (sent, slew, called ...) Y              Who was it that X took?      Who took Y?
    X went (came, returned ...) to Y               Where did X go?              Who went to Y?

so texts and names are real, and questions are as plain as that. Tokens are words and marks, those that training has less than
ten times are one token. The model: sentiment's encoder over question and text, with a vector for words of the text that the
question has too, and one for others with a capital (Chen et al. 2017), before it a convolution over seven words (as QANet has:
Yu et al. 2018, arXiv 1804.09541), behind it one linear layer for begin and end of the answer (Devlin et al. 2018).

Score: answers that are right to the word. Baseline: the first word with a capital behind the text's first word that the question
has not. Margin, stated beforehand: 20 points.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.errors import UserError
from thinwire.tasks.examples import ExampleTask, Rows, Tensors
from thinwire.tasks.own import columns_of
from thinwire.tasks.sentiment import LAYERS, WIDTH, TextEncoder
from thinwire.tasks.task import Score
from thinwire.tasks.text import BEGIN, UNKNOWN, digest_of, padded, split
from thinwire.tasks.verses import load_verses

MAX_HELD_OUT, FEW, LEAST_COUNT = 500, 20, 10
NEAR = 7
KINDS = 4
"""Of words: 0 out of the text, 1 in it, 2 in it and in the question, 3 in it with a capital, and not in the question."""
NO_NAMES = {"And", "But", "Then", "He", "She", "They", "The", "Now", "So", "For", "It", "This"}
RULES: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = (
    (
        r"\b([A-Z]\w+),? the (son|daughter|father|mother|brother|wife|servant|priest|prophet) of ([A-Z]\w+)",
        (("Whose {1} was {0}?", 3), ("Who was the {1} of {2}?", 1)),
    ),
    (r"\b([A-Z]\w+) (?:said|spake|answered) (?:un)?to ([A-Z]\w+)", (("To whom did {0} speak?", 2), ("Who spoke to {1}?", 1))),
    (r"\b([A-Z]\w+) begat ([A-Z]\w+)", (("Whom did {0} beget?", 2), ("Who begat {1}?", 1))),
    (r"\b([A-Z]\w+),? king of ([A-Z]\w+)", (("Of what was {0} king?", 2), ("Who was king of {1}?", 1))),
    (
        r"\b([A-Z]\w+) (took|sent|slew|smote|called|saw|commanded|loved) ([A-Z]\w+)",
        (("Who was it that {0} {1}?", 3), ("Who {1} {2}?", 1)),
    ),
    (
        r"\b([A-Z]\w+) (?:went|came|departed|returned|fled)(?: up| down| out| away| again)? (?:un|in)?to ([A-Z]\w+)",
        (("Where did {0} go?", 2), ("Who went to {1}?", 1)),
    ),
)
_WORD = re.compile(r"\w+|[^\w\s]")
Asked = tuple[list[str], list[str], int, int]
"""Words of the question, words of the text, and where in it the answer begins and ends, both counted."""


class Reader(nn.Module):
    """forward(tokens [B, S], kinds [B, S]) -> logits [B, S, 2] of begin and end; out of the text none. kinds: see `KINDS`."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder, width = encoder, encoder.embed.embedding_dim
        self.kinds = nn.Embedding(KINDS, width)
        self.near = nn.Conv1d(width, width, NEAR, padding=NEAR // 2)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        more = self.kinds(kinds)
        near = self.near((self.encoder.embed(tokens) + more).transpose(1, 2)).transpose(1, 2)
        found: Tensor = self.head(self.encoder(tokens, more + F.gelu(near)))
        return found.masked_fill(kinds[..., None] == 0, -1e4)


class QuestionAnswering(ExampleTask):
    """See the top of the file."""

    item, unit = "question", "nats per question"
    score_is = Score(name="exact answers", unit="%", margin=20.0)

    def load(self) -> dict[str, Any]:
        if self.config.task.source:
            found, about = columns_of(Path(self.config.task.source).expanduser(), ("question", "text", "answer"))
            asked = [_own(*one) for one in found]
        else:
            verses, about = load_verses(self.cache_folder)
            asked = [one for text, _ in verses for one in by_rule(text)]
        longest = self.config.train.sequence
        self._asked = [one for one in asked if len(one[0]) + 1 + len(one[1]) <= longest]
        self._parts = dict(zip(("train", "held_out"), by_text([one[1] for one in self._asked]), strict=True))
        training = [self._asked[row] for row in self._parts["train"].tolist()]
        counts = Counter(word for question, text, _, _ in training for word in {*question, *text})
        words = sorted(word for word, count in counts.items() if count >= LEAST_COUNT)
        self._words = {word: number for number, word in enumerate(words, start=UNKNOWN + 1)}
        self.num_train, self.num_held_out = (len(rows) for rows in self._parts.values())
        sha256 = digest_of(" ".join([*question, *text, str(ends)]) for question, text, *ends in self._asked)
        return {**about, "documents": len(asked), "left_out": len(asked) - len(self._asked), "sha256": sha256}

    def build(self) -> nn.Module:
        width, layers = self.config.task.width or WIDTH, self.config.task.layers or 2 * LAYERS
        return Reader(TextEncoder(len(self._words) + UNKNOWN + 1, width, layers, self.config.train.sequence + 8))

    def examples(self, part: str, rows: Rows) -> Tensors:
        chosen = [self._asked[row] for row in self._parts[part][rows].tolist()]
        before = torch.tensor([len(question) + 1 for question, *_ in chosen])
        ends = torch.tensor([[begin, end] for *_, begin, end in chosen])
        return *self._inputs([one[:2] for one in chosen]), ends + before[:, None]

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        tokens, kinds, ends = batch
        found = model(tokens, kinds)
        return F.cross_entropy(found[..., 0], ends[:, 0]) + F.cross_entropy(found[..., 1], ends[:, 1])

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        tokens, kinds, ends = batch
        return float((model(tokens, kinds).argmax(1) == ends).all(1).sum()), float(len(ends))

    def baseline(self) -> tuple[str, float]:
        right = 0
        for row in self._parts["held_out"].tolist():
            question, text, begin, end = self._asked[row]
            first = next((at for at, word in enumerate(text) if at and word[0].isupper() and word not in question), -1)
            right += begin == end == first
        return "the first other name", 100.0 * right / self.num_held_out

    def predict(self, model: nn.Module, given: str) -> str:
        question, found, text = given.partition("?")
        asked, said = _WORD.findall(question + found), _WORD.findall(text)
        if not found or not said or len(asked) + 1 + len(said) > self.config.train.sequence:
            raise UserError(
                f"give a question with its mark and then a text, of fewer than {self.config.train.sequence} words and marks"
            )
        device = next(model.parameters()).device
        begin, end = model(*(one.to(device) for one in self._inputs([(asked, said)])))[0].argmax(0).tolist()
        return " ".join(said[begin - len(asked) - 1 : end - len(asked)]) or "no answer"

    def shown(self, model: nn.Module, count: int) -> list[str]:
        found = []
        for row in self._parts["held_out"][:count].tolist():
            question, text, begin, end = self._asked[row]
            whole = f"{' '.join(question)} {' '.join(text)}"
            found += [whole, f"answer: {' '.join(text[begin : end + 1])}; model: {self.predict(model, whole)}", ""]
        return found

    def _inputs(self, asked: Sequence[tuple[list[str], list[str]]]) -> tuple[Tensor, Tensor]:
        lists = [
            [*(self._words.get(word, UNKNOWN) for word in question), BEGIN, *(self._words.get(word, UNKNOWN) for word in text)]
            for question, text in asked
        ]
        kinds = [[0] * (len(question) + 1) + [_kind(word, question) for word in text] for question, text in asked]
        return padded(lists), padded(kinds)


def _kind(word: str, question: Sequence[str]) -> int:
    return 2 if word in question else 3 if word[0].isupper() else 1


def by_text(texts: Sequence[list[str]]) -> tuple[Rows, Rows]:
    """Rows for training, and held out: all questions about a text on one side, unless there are few texts."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(map(tuple, texts)))}
    if len(numbers) < FEW:
        return split(len(texts), MAX_HELD_OUT)
    _, held_out = split(len(numbers), MAX_HELD_OUT)
    held = np.isin([numbers[tuple(text)] for text in texts], held_out)
    return np.flatnonzero(~held), np.flatnonzero(held)


def by_rule(text: str) -> Iterator[Asked]:
    """What the rules ask about a text."""
    words = [(match.start(), match[0]) for match in _WORD.finditer(text)]
    places = {start: number for number, (start, _) in enumerate(words)}
    for pattern, questions in RULES:
        for match in re.finditer(pattern, text):
            if NO_NAMES.isdisjoint(match.groups()):
                for question, answer in questions:
                    at = places[match.start(answer)]
                    yield _WORD.findall(question.format(*match.groups())), [word for _, word in words], at, at


def _own(question: str, text: str, answer: str) -> Asked:
    words, wanted = _WORD.findall(text), _WORD.findall(answer)
    for at in range(len(words) - len(wanted) + 1):
        if wanted and words[at : at + len(wanted)] == wanted:
            return _WORD.findall(question), words, at, at + len(wanted) - 1
    raise UserError(f"the answer {answer[:40]!r} to {question[:40]!r} is not in its text; answers are words of the text")
