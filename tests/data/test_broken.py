"""Whatever is wrong with data is said in one line, with file and place; one bad record can be skipped and is counted."""

from pathlib import Path
from typing import Any

import pytest
from broken_forms import BAD_FILES, BAD_RECORDS, SKIPS

from thinwire.config.data import DataSection
from thinwire.config.run import load_run
from thinwire.data.corpus import Corpus, load_corpus
from thinwire.errors import UserError


def load(folder: Path, name: str, content: bytes, options: dict[str, Any]) -> Corpus:
    (folder / name).write_bytes(content)
    if "chat_template" in options:
        (folder / "chat.jinja").write_text(options["chat_template"])
        options = options | {"chat_template": str(folder / "chat.jinja")}
    return load_corpus(DataSection(source=str(folder / name), **options), folder / "cache")


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named_or_skipped_and_counted(tmp_path: Path, name: str) -> None:
    content, options, problem = BAD_RECORDS[name]
    with pytest.raises(UserError) as caught:
        load(tmp_path, name, content, options)
    assert str(caught.value) == f"data file {tmp_path / name} {problem}{SKIPS}"
    record = load(tmp_path, name, content, options | {"skip_bad": True}).record
    assert record["documents"] == 40
    assert record["skipped"] == f"1 unreadable record skipped; the first: data file {tmp_path / name} {problem}"


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_an_error_even_where_records_are_skipped(tmp_path: Path, name: str, skip_bad: bool) -> None:
    content, options, problem = BAD_FILES[name]
    with pytest.raises(UserError) as caught:
        load(tmp_path, name, content, options | {"skip_bad": skip_bad})
    assert str(caught.value) == problem.format(path=tmp_path / name, template=tmp_path / "chat.jinja")
    cache = tmp_path / "cache"
    assert not cache.exists() or not list(cache.iterdir())


def test_a_source_of_which_nothing_can_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no text; 2 unreadable records skipped; the first: .*a\.jsonl line 1 is a number"):
        load(tmp_path, "a.jsonl", b"1\n2\n", {"skip_bad": True})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (['data.sources=[{path="a", weight=0}]'], "data.sources.0.weight = 0: input should be greater than 0"),
        (['data.sources=[{path="a", weight=inf}]'], "data.sources.0.weight = inf: input should be a finite number"),
        (['data.sources=[{path="a", wait=2}]'], "unknown key data.sources.0.wait; allowed: path, weight, field"),
        (
            ['data.sources=[{path="a"}]', "data.source=b"],
            "data: source and sources are both given; write the source as one of the sources",
        ),
    ],
)
def test_sources_are_checked(changes: list[str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run(None, changes)
    assert str(caught.value) == f"the defaults with --set: {problem}"
