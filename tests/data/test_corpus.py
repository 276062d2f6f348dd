import json
import math
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool import Pool, Rank, start_server
from thinwire.config.data import DataSection
from thinwire.config.run import RunConfig
from thinwire.data.corpus import Corpus, bigram_loss, load_corpus, sample, split_documents
from thinwire.environment import read_environment
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.train.setup import make_task


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
    corpus = load_corpus(DataSection(source=str(source)), tmp_path / "cache")
    train, held_out = texts(corpus.train), texts(corpus.held_out)
    assert train | held_out == {path.read_bytes() for path in source.iterdir()} and not train & held_out
    assert 0.02 < len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) < 0.08
    assert corpus.record["files"] == 61 and corpus.record["bytes"] == sum(p.stat().st_size for p in source.iterdir())
    assert (corpus.train.dtype, corpus.vocabulary, corpus.unit) == (np.uint8, 256, "nats per byte")


def test_the_side_of_a_file_follows_from_its_content_alone(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "text")
    before = load_corpus(DataSection(source=str(source)), tmp_path / "cache")
    moved = tmp_path / "moved"
    moved.mkdir()
    for number, path in enumerate(sorted(source.iterdir(), reverse=True)):
        path.rename(moved / f"{number:03}.txt")
    after = load_corpus(DataSection(source=str(moved)), tmp_path / "cache")
    assert texts(before.held_out) == texts(after.held_out)


def test_one_file_gives_its_last_twentieth(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(np.random.default_rng(1).integers(1, 256, 9999, dtype=np.uint8)))
    corpus = load_corpus(DataSection(source=str(path)), tmp_path / "cache")
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == path.read_bytes() + b"\0"
    assert len(corpus.held_out) == 500


def test_a_giant_beside_a_dwarf_is_parted_by_tokens(tmp_path: Path) -> None:
    (tmp_path / "giant.txt").write_text("giant " * 5000)
    (tmp_path / "dwarf.txt").write_text("dwarf")
    corpus = load_corpus(DataSection(source=str(tmp_path / "*.txt")), tmp_path / "cache")
    assert len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) == pytest.approx(0.05, rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 10_000_000), st.integers(0, 40)), min_size=1, max_size=60))
def test_the_held_out_share_is_bounded(documents: list[tuple[int, int]]) -> None:
    sizes, digests = zip(*documents, strict=True)
    chosen = split_documents(sizes, digests)
    if chosen is None:
        return
    wanted = min(0.05 * sum(sizes), 4 << 20)
    assert wanted / 2 <= np.array(sizes)[chosen].sum() <= 1.5 * wanted
    digests = np.array(digests)
    assert not set(digests[chosen]) & set(digests[~chosen])


@given(st.integers(1, 5000), st.integers(1, 6000), st.integers(1, 700))
def test_a_sample_is_spread_evenly_and_takes_no_token_twice(length: int, most: int, chunk: int) -> None:
    taken = sample(np.arange(length), most, chunk)
    assert len(np.unique(taken)) == len(taken) <= most and len(taken) > min(length, most) - min(chunk, most)
    if length > most >= 2 * chunk:
        assert taken[0] == 0 and taken[-1] == length - 1


def test_a_changed_file_makes_new_tokens(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("a" * 100)
    first = load_corpus(DataSection(source=str(path)), tmp_path / "cache")
    path.write_text("b" * 101)
    second = load_corpus(DataSection(source=str(path)), tmp_path / "cache")
    assert first.sha256 != second.sha256 and second.train[0] == ord("b") and first.train[0] == ord("a")


def test_many_processes_at_once_read_the_same_tokens(tmp_path: Path) -> None:
    arguments = (DataSection(source=str(folder_of(tmp_path / "text"))), tmp_path / "cache")
    with start_server().Pool(4) as pool:
        answers = pool.starmap_async(load_corpus, [arguments] * 12, chunksize=1).get(timeout=50)
    assert len({(corpus.sha256, corpus.train.tobytes(), corpus.held_out.tobytes()) for corpus in answers}) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == []
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_interrupted_write_leaves_no_cache(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "text", count=5)
    (source / "bad.jsonl").write_text('{"text": 1}')
    with pytest.raises(UserError, match="line 1"):
        load_corpus(DataSection(source=str(source)), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_caches_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    source = DataSection(source=str(folder_of(tmp_path / "text", count=5)))
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
        load_corpus(DataSection(source=str(tmp_path / "a.txt")), tmp_path / "cache")


def test_the_tokens_are_mapped_and_read_only(tmp_path: Path) -> None:
    corpus = load_corpus(DataSection(source=str(folder_of(tmp_path / "text", count=30))), tmp_path / "cache")
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
    corpus = load_corpus(DataSection(source=str(folder_of(tmp_path / "text", count=30))), tmp_path / "cache")
    assert bigram_loss(corpus.train, corpus.held_out, 256) == pytest.approx(slow_bigram(corpus), rel=1e-12)
    with pytest.raises(UserError, match="not 50257"):
        bigram_loss(corpus.train, corpus.held_out, 50_257)


@pytest.mark.long
def test_the_standard_library_against_its_bigram_table(tmp_path: Path) -> None:
    corpus = load_corpus(DataSection(), tmp_path)
    assert 0.04 < len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) < 0.08
    assert 2.3 < bigram_loss(corpus.train, corpus.held_out, 256) < 2.6
    assert os.listdir(tmp_path) and corpus.record["source"] == "stdlib"


def write_sources(folder: Path) -> DataSection:
    """Two sources that share their first three documents; one document is there twice."""
    for name, first in (("a", 0), ("b", 97)):
        numbers = [*range(first, first + 100), first + 1]
        lines = [json.dumps({"text": f"document {number} " * (1 + number % 7)}) for number in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return DataSection(sources=tuple({"path": str(folder / f"{name}.jsonl"), "weight": n} for name, n in (("a", 3), ("b", 0.5))))


def test_several_sources_stand_apart_and_no_document_is_on_both_sides(tmp_path: Path) -> None:
    corpus = load_corpus(write_sources(tmp_path), tmp_path / "cache")
    assert not texts(corpus.train) & texts(corpus.held_out)
    assert len(texts(corpus.train) | texts(corpus.held_out)) == 197 and corpus.record["documents"] == 202
    assert [part.weight for part in corpus.parts] == [3, 0.5]
    first, second = np.split(corpus.train, [corpus.parts[0].tokens])
    assert len(second) == corpus.parts[1].tokens
    for part, numbers in ((first, range(100)), (second, range(97, 197))):
        assert {int(text.split()[1]) for text in texts(part)} <= set(numbers)


def test_other_weights_need_no_other_tokens(tmp_path: Path) -> None:
    data = write_sources(tmp_path)
    load_corpus(data, tmp_path / "cache")
    other = data.model_copy(update={"sources": tuple(one.model_copy(update={"weight": 7.0}) for one in data.sources)})
    assert [part.weight for part in load_corpus(other, tmp_path / "cache").parts] == [7, 7]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_of_few_documents_each_gives_its_end_and_copies_alike(tmp_path: Path) -> None:
    for name, letter in (("1", "x"), ("2", "y"), ("3", "x")):
        (tmp_path / f"{name}.txt").write_text("".join(f"{letter}{number:04}" for number in range(1000)))
    corpus = load_corpus(DataSection(source=str(tmp_path / "*.txt")), tmp_path / "cache")
    held, train = corpus.held_out.tobytes().decode(), corpus.train.tobytes().decode()
    assert len(held) == 750 and held[:250] == held[500:] != held[250:500]
    for letter in "xy":
        assert f"{letter}0948" in train and f"{letter}0951" not in train and f"{letter}0951" in held


def test_what_is_skipped_is_counted(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {number}"}) for number in range(50)]
    lines[3] = lines[7] = '{"text": '
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    corpus = load_corpus(DataSection(source=str(path), skip_bad=True), tmp_path / "cache")
    assert corpus.record["documents"] == 48
    said = f"2 unreadable records skipped; the first: data file {path} line 4 is not JSON: Expecting value at column 9"
    assert corpus.record["skipped"] == said
    assert load_corpus(DataSection(source=str(path), skip_bad=True), tmp_path / "cache").record["skipped"] == said


def loaded_by_rank(rank: Rank, names: list[str], cache: str) -> str:
    config = RunConfig(data=DataSection(source=names[rank.rank], cache=cache))
    try:
        return make_task(config, Layout(data=2), read_environment()).corpus.sha256
    except UserError as error:
        return str(error)


def test_ranks_with_different_texts_are_named(tmp_path: Path, ranks2: Pool) -> None:
    names = [str(tmp_path / f"{name}.txt") for name in "ab"]
    for name in names:
        Path(name).write_text(f"{Path(name).name} " * 5000)
    first, second = ranks2.run(loaded_by_rank, [names[0]] * 2, str(tmp_path / "cache"))
    assert first == second and len(first) == 64
    for said in ranks2.run(loaded_by_rank, names, str(tmp_path / "cache")):
        assert f"is not the same on all ranks (sha256 {first[:12]} on rank 0, " in said
