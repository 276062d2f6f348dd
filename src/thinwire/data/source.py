"""Which files a text comes from, the documents in them, and their tokens.

A source is a file, a folder (searched through), a glob, or "stdlib": the Python standard library's own sources, which every
user has. Files end in .txt, .md, .py (one document each) or .jsonl (one document a line, under the key "text").

Tokens are bytes as they are, or those of any `tokenizer.json`. A document ends with one separator token: byte 0, which no text
contains, or the end-of-text token of the tokenizer file.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
STDLIB = "stdlib"
BYTES = "bytes"
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def find_files(source: str) -> tuple[Path, ...]:
    """The files of a source in sorted order, none empty. UserError if there is nothing to read."""
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        found = [path for path in root.rglob("*.py") if _NOT_STDLIB.isdisjoint(path.relative_to(root).parts)]
        where = f"the standard library at {root}"
    else:
        found, where = _found(source), f"data source {source!r}"
    try:
        files = tuple(path for path in sorted(found) if path.is_file() and path.stat().st_size)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}: {error.filename}") from None
    if not files:
        what = "only empty files" if found else f"no file that ends in {', '.join(SUFFIXES)}"
        raise UserError(f"{where} has {what}; give a file, a folder, a glob or {STDLIB!r}")
    return files


def _found(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        return [inner for inner in path.rglob("*") if inner.suffix in SUFFIXES]
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise UserError(f"data source {source!r} ends in {path.suffix!r}; known are {', '.join(SUFFIXES)}")
        return [path]
    if any(mark in source for mark in "*?["):
        return [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).suffix in SUFFIXES]
    raise UserError(f"data source {source!r} does not exist; give a file, a folder, a glob or {STDLIB!r}")


def read_bytes(path: Path) -> bytes:
    """UserError if the file cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}") from None


def documents(path: Path) -> Iterator[bytes]:
    """The documents of one file, none empty. UserError names the line of a .jsonl that is not as it should be."""
    content = read_bytes(path)
    if path.suffix != ".jsonl":
        if content:
            yield content
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8"))["text"].encode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data file {path} line {number} is not UTF-8 at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"data file {path} line {number} is not JSON: {error.msg} at column {error.colno}") from None
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            raise UserError(f'data file {path} line {number} needs an object with a string under "text"') from None
        if text:
            yield text


class ByteTokenizer:
    """Every byte is a token; the vocabulary is 256. `identity`: tokens cached under one identity are never read under another."""

    identity = BYTES
    vocabulary = 256
    unit = "nats per byte"

    def encode(self, text: bytes, origin: Path) -> NDArray[Any]:
        """One document with its separator. `origin` is the file it came from, for errors."""
        return np.frombuffer(text + b"\0", dtype=np.uint8)


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library."""

    unit = "nats per token"

    def __init__(self, path: Path) -> None:
        content = read_bytes(path)
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"tokenizer {path} needs the tokenizers library; pip install 'thinwire[tokenizers]', or use {BYTES!r}"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {path} is not a tokenizer.json: {error}") from None
        self.identity = f"{hashlib.sha256(content).hexdigest()} tokenizers {tokenizers.__version__}"
        self.vocabulary = self._tokenizer.get_vocab_size()
        ends = [self._tokenizer.token_to_id(name) for name in _END_OF_TEXT]
        self._end = [end for end in ends if end is not None][:1]

    def encode(self, text: bytes, origin: Path) -> NDArray[Any]:
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data file {origin} is not UTF-8 at byte {error.start}; byte tokens take any file") from None
        return np.array(self._tokenizer.encode(decoded, add_special_tokens=False).ids + self._end, dtype=np.uint32)


Tokenizer = ByteTokenizer | FileTokenizer


def make_tokenizer(name: str) -> Tokenizer:
    """`bytes` or the path of a tokenizer.json. UserError if it cannot be used."""
    return ByteTokenizer() if name == BYTES else FileTokenizer(Path(name).expanduser())
