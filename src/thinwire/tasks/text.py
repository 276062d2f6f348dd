"""Texts as tokens: byte-pair codes learned from a task's own training texts, or a tokenizer.json (extra `tasks`)."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thinwire.errors import UserError
from thinwire.files import written_aside
from thinwire.tasks.examples import Rows

PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


class Codes:
    """Byte-pair codes (Sennrich et al. 2016), learned from `texts`, and kept in the cache folder under the texts' sha256."""

    def __init__(self, texts: Sequence[str], vocabulary: int, cache: Path) -> None:
        tokenizers = library("tokenizers")
        path = cache / f"codes-{digest_of(texts)[:16]}-{vocabulary}.json"
        if not path.is_file():
            made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIAL[UNKNOWN]))
            made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
            made.decoder = tokenizers.decoders.Metaspace()
            trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False)
            made.train_from_iterator(texts, trainer)
            write_cache(path, made.to_str())
        self._codes = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        self.vocabulary: int = self._codes.get_vocab_size()

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Without marks of begin and end."""
        return [one.ids for one in self._codes.encode_batch(list(texts), add_special_tokens=False)]

    def text(self, tokens: Iterable[int]) -> str:
        """Up to the mark of the end."""
        kept = []
        for token in tokens:
            if token == END:
                break
            kept.append(token)
        found: str = self._codes.decode([token for token in kept if token > UNKNOWN])
        return found


def padded(lists: Sequence[Sequence[int]], multiple: int = 8) -> Tensor:
    """int64 [count, length]: filled up to the longest, whose length is rounded up, so that there are few shapes."""
    longest = max((len(one) for one in lists), default=1)
    found = torch.full((len(lists), -(-max(1, longest) // multiple) * multiple), PAD)
    for row, one in enumerate(lists):
        found[row, : len(one)] = torch.tensor(one)
    return found


def split(count: int, held_out: int) -> tuple[Rows, Rows]:
    """Rows for training, and held out: at most so many, spread evenly, at most a tenth (of few, half)."""
    held_out = min(held_out, count // 10 if count >= 20 else count // 2)
    held = np.arange(held_out, dtype=np.int64) * count // max(1, held_out)
    return np.setdiff1d(np.arange(count, dtype=np.int64), held), held


def cached(cache: Path, key: str, make: Callable[[], list[Any]]) -> list[Any]:
    """What `make` gives, plain data, made once and kept in the cache folder. key: names what it was made from."""
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path.is_file():
        found: list[Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    made = make()
    write_cache(path, json.dumps(made, ensure_ascii=False))
    return made


def write_cache(path: Path, content: str | bytes) -> None:
    """Written whole or not at all, by any number of processes at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"cache {path.parent} cannot be written: {error.strerror}; set data.cache") from None


def digest_of(texts: Iterable[str]) -> str:
    """sha256 of texts in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def library(name: str) -> Any:
    """A library of the extra `tasks`. UserError where it is not installed."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"this task needs the library {name}; pip install 'thinwire[tasks]'") from None
