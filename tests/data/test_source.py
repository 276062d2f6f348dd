import sysconfig
from pathlib import Path

import pytest

from thinwire.data.source import find_files
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
    fill(tmp_path, b_dot_txt="b", a_dot_py="a", deep__c_dot_md="c", d_dot_rst="d", empty_dot_txt="")
    names = ["a.py", "b.txt", "deep/c.md"]
    assert [str(path.relative_to(tmp_path)) for path in find_files(str(tmp_path))] == names
    assert find_files(str(tmp_path / "*.txt")) == (tmp_path / "b.txt",)
    assert find_files(str(tmp_path / "**" / "*.m?")) == (tmp_path / "deep" / "c.md",)
    assert find_files(str(tmp_path / "a.py")) == (tmp_path / "a.py",)


def test_sources_without_text_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, data_dot_rst="d", hollow__empty_dot_txt="")
    for source, message in {
        tmp_path / "absent.txt": "does not exist",
        tmp_path / "*.md": "no file that ends in .txt, .md, .py, .jsonl",
        tmp_path / "hollow": "only empty files",
        tmp_path / "hollow" / "empty.txt": "only empty files",
        tmp_path / "data.rst": "ends in '.rst'; known are .txt",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            find_files(str(source))
        assert "\n" not in str(caught.value)
