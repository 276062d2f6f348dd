"""The same documents give the same tokens, whatever form they are kept in."""

import sys
from pathlib import Path

import numpy as np
import pytest
from every_form import FLAT, NESTED, arrow, parquet, write_saved

from thinwire.config.data import DataSection
from thinwire.data.corpus import load_corpus
from thinwire.errors import UserError

SAVED = Path(__file__).parent / "saved_by_datasets"
"""Written by `save_to_disk` of datasets 5.2.0."""


def texts(count: int = 60) -> list[str]:
    """With what the forms have to quote."""
    generator = np.random.default_rng(3)
    return [f'{number},\t"é" {generator.integers(1 << 40)}\n' * int(generator.integers(1, 9)) for number in range(count)]


def tokens(tmp_path: Path, **data: object) -> tuple[bytes, bytes, str]:
    corpus = load_corpus(DataSection(**data), tmp_path / "cache")
    return corpus.train.tobytes(), corpus.held_out.tobytes(), corpus.sha256


@pytest.fixture
def reference(tmp_path: Path) -> tuple[bytes, bytes, str]:
    folder = tmp_path / "plain"
    folder.mkdir()
    for number, text in enumerate(texts()):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return tokens(tmp_path, source=str(folder))


@pytest.mark.parametrize("name", [*FLAT, *NESTED])
def test_every_form_gives_the_tokens_of_plain_files(tmp_path: Path, reference: tuple[bytes, bytes, str], name: str) -> None:
    records = [{"id": str(number), "text": text} for number, text in enumerate(texts())]
    (tmp_path / name).write_bytes((FLAT | NESTED)[name](records))
    assert tokens(tmp_path, source=str(tmp_path / name)) == reference


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("field", ["meta.body", "{meta.head}{{{meta.tail}}}"])
def test_dotted_names_and_templates_in_every_form(tmp_path: Path, name: str, field: str) -> None:
    records = [{"n": 1, "meta": {"body": text, "head": text[:3], "tail": text[3:]}} for text in texts()]
    (tmp_path / name).write_bytes(NESTED[name](records))
    plain = [text if field == "meta.body" else f"{text[:3]}{{{text[3:]}}}" for text in texts()]
    (tmp_path / "plain.jsonl").write_bytes(NESTED["a.jsonl"]([{"text": text} for text in plain]))
    expected = tokens(tmp_path, source=str(tmp_path / "plain.jsonl"))
    assert tokens(tmp_path, source=str(tmp_path / name), field=field) == expected


def test_a_column_whose_name_has_a_dot(tmp_path: Path, reference: tuple[bytes, bytes, str]) -> None:
    for name in ("a.csv", "a.jsonl", "a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes((FLAT | NESTED)[name]([{"meta.text": text} for text in texts()]))
        assert tokens(tmp_path, source=str(tmp_path / name), field="meta.text") == reference


def test_a_folder_that_datasets_saved(tmp_path: Path, reference: tuple[bytes, bytes, str]) -> None:
    folder = write_saved(tmp_path / "saved" / "train", [{"text": text} for text in texts()])
    assert tokens(tmp_path, source=str(folder)) == reference
    assert tokens(tmp_path, source=str(tmp_path / "saved")) == reference
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"holds the splits train, test; give the folder of one, e\.g\. .*saved/train$"):
        tokens(tmp_path, source=str(tmp_path / "saved"))
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"lacks data-00001-of-00002\.arrow, which its state\.json lists"):
        tokens(tmp_path, source=str(folder))
    (folder / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"state\.json lists no _data_files"):
        tokens(tmp_path, source=str(folder))


def test_a_folder_that_datasets_itself_saved(tmp_path: Path) -> None:
    corpus = load_corpus(DataSection(source=str(SAVED / "train"), field="meta.body"), tmp_path)
    assert b"".join((corpus.train.tobytes(), corpus.held_out.tobytes())).count(b"\0") == corpus.record["documents"] == 40
    with pytest.raises(UserError, match="holds the splits train, test"):
        load_corpus(DataSection(source=str(SAVED)), tmp_path)


def test_a_folder_of_mixed_forms(tmp_path: Path, reference: tuple[bytes, bytes, str]) -> None:
    records = [{"text": text} for text in texts()]
    mixed = tmp_path / "mixed"
    write_saved(mixed / "4", records[40:])
    (mixed / "1.jsonl.gz").write_bytes(NESTED["a.jsonl.gz"](records[:20]))
    (mixed / "2.parquet").write_bytes(parquet(records[20:30]))
    (mixed / "3.arrow").write_bytes(arrow(records[30:40]))
    assert tokens(tmp_path, source=str(mixed)) == reference


def test_other_options_make_other_tokens_and_the_same_ones_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(FLAT["a.csv"]([{"text": text, "other": text[::-1]} for text in texts()]))
    source = str(tmp_path / "a.csv")
    made = [tokens(tmp_path, source=source, field=field) for field in ("text", "other", "{text}{other}", "text")]
    assert made[0] == made[3] and len(set(made)) == 3
    tokens(tmp_path, source=source, skip_bad=True)
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_missing_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(NESTED[name]([{"text": "a"}] * 12))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=rf"{name} needs the pyarrow library; pip install 'thinwire\[data\]'$"):
        tokens(tmp_path, source=str(tmp_path / name))


def test_a_document_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(FLAT["a.csv"]([{"text": "x" * 200_000}]))
    assert len(tokens(tmp_path, source=str(tmp_path / "a.csv"))[0]) == 190_001
