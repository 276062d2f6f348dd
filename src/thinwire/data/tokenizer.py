"""The tokens of a document: its bytes as they are, or those of any `tokenizer.json`.

A document ends with one separator token: byte 0, which no text contains, or the end-of-text token of the tokenizer file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.data.source import read_bytes
from thinwire.errors import UserError

BYTES = "bytes"
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class ByteTokenizer:
    """Every byte is a token; the vocabulary is 256. `identity`: tokens cached under one identity are never read under another."""

    identity = BYTES
    vocabulary = 256
    unit = "nats per byte"

    end: int | None = 0
    """The token that ends a document."""

    def encode(self, text: bytes, where: str) -> NDArray[Any]:
        """One document with its separator. `where` it stands, for errors."""
        return np.frombuffer(text + b"\0", dtype=np.uint8)

    def tokens(self, text: str) -> list[int]:
        """Of a text that goes on."""
        return list(text.encode("utf-8"))

    def text(self, tokens: Sequence[int]) -> str:
        """A character that is not whole is U+FFFD."""
        return bytes(tokens).decode("utf-8", "replace")


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library."""

    unit = "nats per token"

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_bytes(path, "tokenizer")
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
        self.end: int | None = next((end for end in ends if end is not None), None)

    def encode(self, text: bytes, where: str) -> NDArray[Any]:
        """As ByteTokenizer.encode. UserError for text that is not UTF-8."""
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            raise UserError(f"{where} line {line} is not UTF-8 at byte {error.start}; byte tokens take any file") from None
        return np.array(self.tokens(decoded) + ([] if self.end is None else [self.end]), dtype=np.uint32)

    def tokens(self, text: str) -> list[int]:
        """As of ByteTokenizer."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def text(self, tokens: Sequence[int]) -> str:
        """As of ByteTokenizer; without what only structures a text, such as its end."""
        text: str = self._tokenizer.decode(list(tokens))
        return text


Tokenizer = ByteTokenizer | FileTokenizer


def make_tokenizer(name: str) -> Tokenizer:
    """`bytes` or the path of a tokenizer.json. UserError if it cannot be used."""
    return ByteTokenizer() if name == BYTES else FileTokenizer(Path(name).expanduser())
