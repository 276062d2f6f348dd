"""Tokens on disk: a text tokenised once, split into training and held-out tokens, and mapped into memory.

Documents are split by their content: distinct contents, in the order of their sha256, go to the held-out part until it has
5 % of the bytes (at most 4 MiB), so equal documents never stand on both sides, whichever files or sources they come from. Where
whole documents cannot give about that much (a single one, one giant), the last 5 % of each is held out instead.

A cache folder is named by what it was made from (names, sizes and times of the files, fields, chat template, tokenizer). It is
written aside and renamed, so several processes may ask at once: one folder wins, the others' work is dropped, nobody reads half a
file. Weights are not in it: the training tokens of each source stand together, once, and the loader draws from them.

The baseline for any model of the text is a table of pairs, whose counts come from the training tokens alone:

    p(b | a) = (count(a, b) + 1) / (count(a) + V),        loss = - mean of ln p over the held-out pairs
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.config.data import DataSection
from thinwire.data.chat import Chat
from thinwire.data.documents import Field, Unreadable, documents
from thinwire.data.source import find_files
from thinwire.data.tokenizer import Tokenizer, make_tokenizer
from thinwire.errors import UserError

HELD_OUT_FRACTION = 0.05
HELD_OUT_MOST_BYTES = 4 << 20
LARGEST_VOCABULARY = 4096
_FORMAT = 2
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Part:
    """The training tokens of one source, and how often an epoch shows them."""

    source: str
    tokens: int
    weight: float


@dataclass(frozen=True)
class Corpus:
    """`train` and `held_out` are read-only arrays of uint8, uint16 or uint32, mapped from disk and disjoint. `train` is its
    `parts`, one after the other."""

    train: NDArray[Any]
    held_out: NDArray[Any]
    parts: tuple[Part, ...]
    vocabulary: int
    unit: str
    sha256: str
    record: dict[str, Any]
    """`data` of record.json."""


def load_corpus(data: DataSection, cache: Path) -> Corpus:
    """The tokens of all sources, from the cache folder where they are there, else written to it. Any number of processes at once.

    `sha256` covers the documents in their order. UserError for a source or a tokenizer that cannot be used.
    """
    encoder, chat = make_tokenizer(data.tokenizer), Chat(data.chat_template, data.tokenizer)
    inputs = [(find_files(source.path), Field(source.field, chat)) for source in data.each()]
    folder = cache / f"tokens-{_key(data, inputs, f'{encoder.identity} {chat.identity}')}"
    if not (folder / "meta.json").exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".tokens-", dir=cache))
        except OSError as error:
            raise UserError(f"token cache {cache} cannot be written: {error.strerror}") from None
        try:
            _write(aside, data, inputs, encoder)
            aside.rename(folder)
        except OSError as error:
            if not (folder / "meta.json").exists():  # else another process was first
                raise UserError(f"token cache {folder} cannot be written: {error.strerror}") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return _read(folder, data, encoder)


def sample(tokens: NDArray[Any], most: int, chunk: int = 4096) -> NDArray[Any]:
    """At most `most` tokens, in chunks spread evenly over all: one held-out text for the model and for its baseline alike."""
    if len(tokens) <= most:
        return tokens
    chunk = min(chunk, most)
    count = most // chunk
    starts = np.arange(count, dtype=np.int64) * (len(tokens) - chunk) // max(1, count - 1)
    return np.concatenate([tokens[start : start + chunk] for start in starts])


def split_documents(sizes: Sequence[int], digests: Sequence[int]) -> NDArray[np.bool_] | None:
    """Which documents are held out, by sizes in bytes and 64 bits of sha256; None where whole ones cannot give about 5 %."""
    distinct, group = np.unique(np.asarray(digests, dtype=np.uint64), return_inverse=True)
    bytes_of = np.bincount(group, weights=np.asarray(sizes, dtype=np.float64))
    wanted = min(HELD_OUT_FRACTION * bytes_of.sum(), HELD_OUT_MOST_BYTES)
    chosen, held = np.zeros(len(distinct), dtype=bool), 0.0
    for index, size in enumerate(bytes_of):
        if held >= wanted:
            break
        if held + size <= 1.5 * wanted:
            chosen[index] = True
            held += size
    return chosen[group] if held >= wanted / 2 else None


Input = tuple[tuple[Path, ...], Field]


def _key(data: DataSection, inputs: Sequence[Input], identity: str) -> str:
    rules = (_FORMAT, HELD_OUT_FRACTION, HELD_OUT_MOST_BYTES, data.skip_bad, [source.field for source in data.each()])
    stamps = [[(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files] for files, _ in inputs]
    return hashlib.sha256(json.dumps([rules, identity, stamps]).encode()).hexdigest()[:24]


def _write(folder: Path, data: DataSection, inputs: Sequence[Input], tokenizer: Tokenizer) -> None:
    """All tokens to one file, document after document; then, as the digests of all are known, the parts from it."""
    dtype = np.dtype(np.uint8 if tokenizer.vocabulary <= 1 << 8 else np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32)
    whole, bad = hashlib.sha256(), Unreadable(data.skip_bad)
    digests, sizes, lengths, first_documents = array("Q"), array("Q"), array("Q"), [0]
    with open(folder / "all.bin", "wb") as out:
        for source, (files, field) in zip(data.each(), inputs, strict=True):
            for where, text in (found for path in files for found in documents(path, field, bad)):
                try:
                    tokens = tokenizer.encode(text, where)
                except UserError as error:
                    bad(str(error))
                    continue
                out.write(tokens.astype(dtype, copy=False).tobytes())
                whole.update(text)
                digests.append(int.from_bytes(hashlib.sha256(text).digest()[:8]))
                sizes.append(len(text))
                lengths.append(len(tokens))
            if len(lengths) == first_documents[-1]:
                raise UserError(f"data source {source.path!r} holds no text{f'; {bad.said()}' if bad.count else ''}")
            first_documents.append(len(lengths))
    heads = _heads(np.asarray(lengths, dtype=np.int64), split_documents(sizes, digests), dtype.itemsize)
    _part(folder, dtype, lengths, heads)
    meta = {
        "dtype": dtype.name,
        "files": sum(len(files) for files, _ in inputs),
        "documents": len(lengths),
        "bytes": sum(sizes),
        "sha256": whole.hexdigest(),
        "skipped": bad.said() if bad.count else "",
        "parts": np.add.reduceat(heads, first_documents[:-1]).tolist(),
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _heads(lengths: NDArray[np.int64], held_out: NDArray[np.bool_] | None, itemsize: int) -> NDArray[np.int64]:
    """How many tokens of each document are for training: all, none, or all but the last where documents are parted."""
    if held_out is not None:
        return np.where(held_out, 0, lengths)
    share = min(HELD_OUT_FRACTION, HELD_OUT_MOST_BYTES / max(1, lengths.sum() * itemsize))
    return lengths - (share * lengths).astype(np.int64)


def _part(folder: Path, dtype: np.dtype[Any], lengths: Sequence[int], heads: NDArray[np.int64]) -> None:
    everything, *parts = (folder / f"{name}.bin" for name in ("all", "train", "held_out"))
    with open(everything, "rb") as tokens, open(parts[0], "wb") as train, open(parts[1], "wb") as held:
        for length, head in zip(lengths, heads.tolist(), strict=True):
            train.write(tokens.read(head * dtype.itemsize))
            held.write(tokens.read((length - head) * dtype.itemsize))
    everything.unlink()


def _read(folder: Path, data: DataSection, tokenizer: Tokenizer) -> Corpus:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        paths = [folder / f"{name}.bin" for name in ("train", "held_out")]
        if not all(path.stat().st_size for path in paths):
            raise UserError(f"data source {str(data)!r} has {meta['bytes']} bytes, too few to hold 5 % of them out")
        train, held_out = (np.memmap(path, dtype=meta["dtype"], mode="r") for path in paths)
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"token cache {folder} cannot be read ({error}); delete that folder to make it anew") from None
    return Corpus(
        train=train,
        held_out=held_out,
        parts=tuple(Part(one.path, tokens, one.weight) for one, tokens in zip(data.each(), meta["parts"], strict=True)),
        vocabulary=tokenizer.vocabulary,
        unit=tokenizer.unit,
        sha256=meta["sha256"],
        record={"source": str(data), **{key: meta[key] for key in ("files", "documents", "bytes", "sha256", "skipped")}},
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
