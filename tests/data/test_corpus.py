import math
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import start_server
from thinwire.data.corpus import Corpus, bigram_loss, load_corpus, sample, split_files
from thinwire.errors import UserError


def folder_of(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Files of distinct random lines, each with its own number in every line."""
    generator = np.random.default_rng(seed)
    path.mkdir()
    for number in range(count):
        lines = [f"file {number} line {line} {generator.integers(1 << 30)}" for line in range(generator.integers(20, 60))]
        (path / f"{number:03}.txt").write_text("\n".join(lines))
    return path


def texts(tokens: np.ndarray) -> set[bytes]:
    return set(tokens.tobytes().split(b"\0")) - {b""}


def test_every_file_is_on_exactly_one_side(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "text")
    shutil.copy(source / "003.txt", source / "copy.txt")
    corpus = load_corpus(str(source), tmp_path / "cache")
    train, held_out = texts(corpus.train), texts(corpus.held_out)
    assert train | held_out == {path.read_bytes() for path in source.iterdir()} and not train & held_out
    assert 0.02 < len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) < 0.08
    assert corpus.record["files"] == 61 and corpus.record["bytes"] == sum(p.stat().st_size for p in source.iterdir())
    assert (corpus.train.dtype, corpus.vocabulary, corpus.unit) == (np.uint8, 256, "nats per byte")


def test_the_side_of_a_file_follows_from_its_content_alone(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "text")
    before = load_corpus(str(source), tmp_path / "cache")
    moved = tmp_path / "moved"
    moved.mkdir()
    for number, path in enumerate(sorted(source.iterdir(), reverse=True)):
        path.rename(moved / f"{number:03}.txt")
    after = load_corpus(str(moved), tmp_path / "cache")
    assert texts(before.held_out) == texts(after.held_out)


def test_one_file_gives_its_last_twentieth(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(np.random.default_rng(1).integers(1, 256, 9999, dtype=np.uint8)))
    corpus = load_corpus(str(path), tmp_path / "cache")
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == path.read_bytes() + b"\0"
    assert len(corpus.held_out) == 500


def test_a_giant_beside_a_dwarf_is_parted_by_tokens(tmp_path: Path) -> None:
    (tmp_path / "giant.txt").write_text("giant " * 5000)
    (tmp_path / "dwarf.txt").write_text("dwarf")
    corpus = load_corpus(str(tmp_path / "*.txt"), tmp_path / "cache")
    assert len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) == pytest.approx(0.05, rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 10_000_000), st.text("abcdef", min_size=1, max_size=6)), min_size=1, max_size=60))
def test_the_held_out_share_is_bounded(files: list[tuple[int, str]]) -> None:
    sizes, digests = zip(*files, strict=True)
    chosen = split_files(sizes, digests)
    held, total = sum(size for size, digest in files if digest in chosen), sum(sizes)
    wanted = min(0.05 * total, 4 << 20)
    assert not chosen or wanted / 2 <= held <= 1.5 * wanted


@given(st.integers(1, 5000), st.integers(1, 6000), st.integers(1, 700))
def test_a_sample_is_spread_evenly_and_takes_no_token_twice(length: int, most: int, chunk: int) -> None:
    taken = sample(np.arange(length), most, chunk)
    assert len(np.unique(taken)) == len(taken) <= most and len(taken) > min(length, most) - min(chunk, most)
    if length > most >= 2 * chunk:
        assert taken[0] == 0 and taken[-1] == length - 1


def test_a_changed_file_makes_new_tokens(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("a" * 100)
    first = load_corpus(str(path), tmp_path / "cache")
    path.write_text("b" * 101)
    second = load_corpus(str(path), tmp_path / "cache")
    assert first.sha256 != second.sha256 and second.train[0] == ord("b") and first.train[0] == ord("a")


def test_many_processes_at_once_read_the_same_tokens(tmp_path: Path) -> None:
    arguments = (str(folder_of(tmp_path / "text")), tmp_path / "cache")
    with start_server().Pool(4) as pool:
        answers = pool.starmap_async(load_corpus, [arguments] * 12, chunksize=1).get(timeout=50)
    assert len({(corpus.sha256, corpus.train.tobytes(), corpus.held_out.tobytes()) for corpus in answers}) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == []
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_interrupted_write_leaves_no_cache(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "text", count=5)
    (source / "bad.jsonl").write_text('{"text": 1}')
    with pytest.raises(UserError, match="line 1"):
        load_corpus(str(source), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_caches_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    source = str(folder_of(tmp_path / "text", count=5))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"token cache .*file cannot be written"):
        load_corpus(source, tmp_path / "file")
    load_corpus(source, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "train.bin").unlink()
    with pytest.raises(UserError, match=r"cannot be read .*; delete that folder"):
        load_corpus(source, tmp_path / "cache")


def test_a_text_too_short_to_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="5 bytes, too few"):
        load_corpus(str(tmp_path / "a.txt"), tmp_path / "cache")


def test_the_tokens_are_mapped_and_read_only(tmp_path: Path) -> None:
    corpus = load_corpus(str(folder_of(tmp_path / "text", count=30)), tmp_path / "cache")
    for part in (corpus.train, corpus.held_out):
        assert isinstance(part, np.memmap) and not part.flags.writeable


def slow_bigram(corpus: Corpus) -> float:
    counts: dict[tuple[int, int], int] = {}
    train, held_out = corpus.train.tolist(), corpus.held_out.tolist()
    for pair in pairwise(train):
        counts[pair] = counts.get(pair, 0) + 1
    before = {first: train[:-1].count(first) for first in range(256)}
    losses = [-math.log((counts.get((a, b), 0) + 1) / (before[a] + 256)) for a, b in pairwise(held_out)]
    return sum(losses) / len(losses)


def test_the_bigram_loss_is_its_definition(tmp_path: Path) -> None:
    corpus = load_corpus(str(folder_of(tmp_path / "text", count=30)), tmp_path / "cache")
    assert bigram_loss(corpus.train, corpus.held_out, 256) == pytest.approx(slow_bigram(corpus), rel=1e-12)
    with pytest.raises(UserError, match="not 50257"):
        bigram_loss(corpus.train, corpus.held_out, 50_257)


def test_the_standard_library_against_its_bigram_table(tmp_path: Path) -> None:
    corpus = load_corpus("stdlib", tmp_path)
    assert 0.04 < len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) < 0.08
    assert 2.3 < bigram_loss(corpus.train, corpus.held_out, 256) < 2.6
    assert os.listdir(tmp_path) and corpus.record["source"] == "stdlib"
