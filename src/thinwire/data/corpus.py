"""Tokens on disk: a text tokenised once, split into training and held-out tokens, and mapped into memory.

Files are split by their content: distinct contents, in the order of their sha256, go to the held-out part until it has
5 % of the bytes (at most 4 MiB), so equal files never stand on both sides. Where whole files cannot give about that much
(a single file, one giant), the last 5 % of all tokens are held out instead.

A cache folder is named by what it was made from (names, sizes and times of the files, tokenizer). It is written aside
and renamed, so several processes may ask at once: one folder wins, the others' work is dropped, nobody reads half a file.

The baseline for any model of the text is a table of pairs, whose counts come from the training tokens alone:

    p(b | a) = (count(a, b) + 1) / (count(a) + V),        loss = - mean of ln p over the held-out pairs
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.data.source import BYTES, Tokenizer, documents, find_files, make_tokenizer, read_bytes
from thinwire.errors import UserError

HELD_OUT_FRACTION = 0.05
HELD_OUT_MOST_BYTES = 4 << 20
LARGEST_VOCABULARY = 4096
_FORMAT = 1
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """`train` and `held_out` are read-only arrays of uint8, uint16 or uint32, mapped from disk and disjoint."""

    train: NDArray[Any]
    held_out: NDArray[Any]
    vocabulary: int
    unit: str
    sha256: str
    record: dict[str, Any]
    """`data` of record.json."""


def load_corpus(source: str, cache: Path, tokenizer: str = BYTES) -> Corpus:
    """The tokens of a source, from the cache folder where they are there, else written to it. Any number of processes at once.

    `sha256` covers the contents in the order of the files. UserError for a source or a tokenizer that cannot be used.
    """
    files, encoder = find_files(source), make_tokenizer(tokenizer)
    folder = cache / f"tokens-{_key(files, encoder)}"
    if not (folder / "meta.json").exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".tokens-", dir=cache))
        except OSError as error:
            raise UserError(f"token cache {cache} cannot be written: {error.strerror}") from None
        try:
            _write(aside, files, encoder)
            aside.rename(folder)
        except OSError as error:
            if not (folder / "meta.json").exists():  # else another process was first
                raise UserError(f"token cache {folder} cannot be written: {error.strerror}") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return _read(folder, source, encoder)


def sample(tokens: NDArray[Any], most: int, chunk: int = 4096) -> NDArray[Any]:
    """At most `most` tokens, in chunks spread evenly over all: one held-out text for the model and for its baseline alike."""
    if len(tokens) <= most:
        return tokens
    chunk = min(chunk, most)
    count = most // chunk
    starts = np.arange(count, dtype=np.int64) * (len(tokens) - chunk) // max(1, count - 1)
    return np.concatenate([tokens[start : start + chunk] for start in starts])


def split_files(sizes: Sequence[int], digests: Sequence[str]) -> frozenset[str]:
    """The digests of the contents that are held out; empty where whole files cannot give about 5 %."""
    total = sum(sizes)
    wanted = min(HELD_OUT_FRACTION * total, HELD_OUT_MOST_BYTES)
    groups: dict[str, int] = {}
    for size, digest in zip(sizes, digests, strict=True):
        groups[digest] = groups.get(digest, 0) + size
    chosen, held = set(), 0
    for digest in sorted(groups):
        if held < wanted and held + groups[digest] <= 1.5 * wanted:
            chosen.add(digest)
            held += groups[digest]
    return frozenset(chosen) if held >= wanted / 2 else frozenset()


def _key(files: Sequence[Path], tokenizer: Tokenizer) -> str:
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    rules = (_FORMAT, HELD_OUT_FRACTION, HELD_OUT_MOST_BYTES)
    return hashlib.sha256(json.dumps([rules, tokenizer.identity, stamps]).encode()).hexdigest()[:24]


def _write(folder: Path, files: Sequence[Path], tokenizer: Tokenizer) -> None:
    """Two passes over the files, one of them in memory at a time: hash, then encode."""
    whole, digests, sizes = hashlib.sha256(), [], []
    for path in files:
        content = read_bytes(path)
        whole.update(content)
        digests.append(hashlib.sha256(content).hexdigest())
        sizes.append(len(content))
    held_out = split_files(sizes, digests)
    dtype = np.dtype(np.uint8 if tokenizer.vocabulary <= 1 << 8 else np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32)
    with open(folder / "train.bin", "wb") as train, open(folder / "held_out.bin", "wb") as held:
        for path, digest in zip(files, digests, strict=True):
            for text in documents(path):
                tokens = tokenizer.encode(text, path).astype(dtype, copy=False)
                (held if digest in held_out else train).write(tokens.tobytes())
    if not held_out:
        _move_tail(folder, dtype.itemsize)
    meta = {"dtype": dtype.name, "files": len(files), "bytes": sum(sizes), "sha256": whole.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def _move_tail(folder: Path, itemsize: int) -> None:
    """The last tokens of the training part become the held-out part."""
    size = (folder / "train.bin").stat().st_size
    tail = int(min(HELD_OUT_FRACTION * size, HELD_OUT_MOST_BYTES)) // itemsize * itemsize
    with open(folder / "train.bin", "r+b") as train:
        train.seek(size - tail)
        (folder / "held_out.bin").write_bytes(train.read())
        train.truncate(size - tail)


def _read(folder: Path, source: str, tokenizer: Tokenizer) -> Corpus:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        paths = [folder / f"{name}.bin" for name in ("train", "held_out")]
        if not all(path.stat().st_size for path in paths):
            raise UserError(f"data source {source!r} has {meta['bytes']} bytes, too few to hold 5 % of them out")
        train, held_out = (np.memmap(path, dtype=meta["dtype"], mode="r") for path in paths)
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"token cache {folder} cannot be read ({error}); delete that folder to make it anew") from None
    return Corpus(
        train=train,
        held_out=held_out,
        vocabulary=tokenizer.vocabulary,
        unit=tokenizer.unit,
        sha256=meta["sha256"],
        record={"source": source, **{key: meta[key] for key in ("files", "bytes", "sha256")}},
    )


def bigram_loss(train: NDArray[Any], held_out: NDArray[Any], vocabulary: int) -> float:
    """Nats per token. UserError above 4,096 tokens of vocabulary, where the table of pairs is larger than it is worth."""
    if vocabulary > LARGEST_VOCABULARY:
        raise UserError(f"a table of pairs is kept up to {LARGEST_VOCABULARY} tokens of vocabulary, not {vocabulary}")
    if len(held_out) < 2:
        raise UserError(f"the held-out part has {len(held_out)} tokens; take more text")
    counts = _pairs(train, vocabulary) + 1.0
    loss = np.log(counts.sum(axis=1, keepdims=True)) - np.log(counts)
    return float((_pairs(held_out, vocabulary) * loss).sum() / (len(held_out) - 1))


def _pairs(tokens: NDArray[Any], vocabulary: int) -> NDArray[np.int64]:
    """How often each token follows each other, [V, V]; in chunks, so that a large memory map stays on disk."""
    counts = np.zeros(vocabulary * vocabulary, dtype=np.int64)
    for first in range(0, len(tokens) - 1, _CHUNK):
        chunk = tokens[first : first + _CHUNK + 1].astype(np.int64)
        counts += np.bincount(chunk[:-1] * vocabulary + chunk[1:], minlength=vocabulary * vocabulary)
    return counts.reshape(vocabulary, vocabulary)
