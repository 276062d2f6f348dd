"""Which files a text comes from, and the documents in them.

A source is a file, a folder (searched through), a glob, or "stdlib": the Python standard library's own sources, which every
user has. Files end in .txt, .md, .py (one document each) or .jsonl (one document a line, under the key "text").
"""

from __future__ import annotations

import glob
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from thinwire.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
STDLIB = "stdlib"
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
            raise UserError(f'data file {path} line {number} wants an object with a string under "text"') from None
        if text:
            yield text
