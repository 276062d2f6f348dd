import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from thinwire.config.data import DataSection
from thinwire.data.corpus import load_corpus
from thinwire.data.tokenizer import make_tokenizer
from thinwire.errors import UserError

needs_library = pytest.mark.skipif(importlib.util.find_spec("tokenizers") is None, reason="the tokenizers extra is absent")


def write_tokenizer(path: Path, words: list[str]) -> Path:
    """Splits on white space; as many extra entries as make the vocabulary larger than a byte."""
    vocabulary = {word: number for number, word in enumerate([*words, *(f"<unused{n}>" for n in range(300))])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": words[0]}
    content = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
    for key in ("truncation", "padding", "normalizer", "post_processor", "decoder"):
        content[key] = None
    path.write_text(json.dumps(content))
    return path


def test_bytes_are_their_own_tokens() -> None:
    tokenizer = make_tokenizer("bytes")
    assert tokenizer.encode("é".encode(), "").tolist() == [0xC3, 0xA9, 0]
    assert tokenizer.vocabulary == 256


def test_a_missing_library_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", ["?"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'thinwire\[tokenizers\]'"):
        make_tokenizer(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        make_tokenizer(str(tmp_path / "tokenizer.json"))


@needs_library
def test_a_tokenizer_file_is_used_and_cached_apart(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", ["?", "thin", "wire", "</s>"])
    (tmp_path / "a.txt").write_text("thin wire wire " * 20)
    corpus = load_corpus(DataSection(source=str(tmp_path / "a.txt"), tokenizer=str(path)), tmp_path / "cache")
    assert (corpus.train.dtype, corpus.vocabulary, corpus.unit) == (np.uint16, 304, "nats per token")
    assert [*corpus.train, *corpus.held_out] == [1, 2, 2] * 20 + [3]
    assert load_corpus(DataSection(source=str(tmp_path / "a.txt")), tmp_path / "cache").vocabulary == 256


@needs_library
def test_what_a_tokenizer_cannot_take_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json is not a tokenizer\.json"):
        make_tokenizer(str(tmp_path / "broken.json"))
    tokenizer = make_tokenizer(str(write_tokenizer(tmp_path / "tokenizer.json", ["?"])))
    with pytest.raises(UserError, match=r"data file a\.txt line 1 is not UTF-8 at byte 2"):
        tokenizer.encode(b"ab\xff", "data file a.txt")
