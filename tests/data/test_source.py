import json
import sysconfig
from pathlib import Path

import pytest

from thinwire.data.source import documents, find_files
from thinwire.errors import UserError


def fill(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_standard_library_is_found_without_its_tests() -> None:
    files = find_files("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).parts for path in files]
    assert list(files) == sorted(files) and ("argparse.py",) in names and sum(path.stat().st_size for path in files) > 5e6
    assert not {part for parts in names for part in parts} & {"site-packages", "test", "tests", "__pycache__", "idle_test"}


def test_a_folder_a_glob_and_a_file(tmp_path: Path) -> None:
    fill(tmp_path, b_dot_txt="b", a_dot_py="a", deep__c_dot_md="c", d_dot_csv="d", empty_dot_txt="")
    names = ["a.py", "b.txt", "deep/c.md"]
    assert [str(path.relative_to(tmp_path)) for path in find_files(str(tmp_path))] == names
    assert find_files(str(tmp_path / "*.txt")) == (tmp_path / "b.txt",)
    assert find_files(str(tmp_path / "**" / "*.m?")) == (tmp_path / "deep" / "c.md",)
    assert find_files(str(tmp_path / "a.py")) == (tmp_path / "a.py",)


def test_documents_of_a_jsonl_are_its_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "één\\n"}\n\n{"text": ""}\n{"text": "two", "id": 3}')
    assert list(documents(path)) == ["één\n".encode(), b"two"]


def test_sources_without_text_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, data_dot_csv="d", hollow__empty_dot_txt="")
    for source, message in {
        tmp_path / "absent.txt": "does not exist",
        tmp_path / "*.md": "no file that ends in .txt, .md, .py, .jsonl",
        tmp_path / "hollow": "only empty files",
        tmp_path / "hollow" / "empty.txt": "only empty files",
        tmp_path / "data.csv": "ends in '.csv'; known are .txt",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            find_files(str(source))
        assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match=r"a\.txt cannot be read: Is a directory"):
        list(documents(tmp_path / "a.txt"))


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt cannot be read: No such file"):
        list(documents(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', "line 3 is not UTF-8 at byte 10"),
        (b'{"text": ', "line 3 is not JSON: .* at column"),
        (b'{"body": "x"}', 'line 3 needs an object with a string under "text"'),
        (b'{"text": 7}', "line 3 needs an object"),
        (b"[1]", "line 3 needs an object"),
        (json.dumps({"text": "\ud800"}).encode(), "line 3 needs an object"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=message):
        list(documents(path))
