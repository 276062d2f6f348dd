"""Which files a text comes from.

A source is a file, a folder (searched through), a glob, or "stdlib": the Python standard library's own sources, which every
user has. A folder that `save_to_disk` of the Hugging Face `datasets` library wrote counts as the Arrow files that its state.json
lists; one of several splits (dataset_dict.json) is named by its own folder.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from pathlib import Path
from typing import Any

from thinwire.config.data import STDLIB
from thinwire.errors import UserError

TEXT = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".json", ".csv", ".tsv")
TABLES = (".parquet", ".arrow")
PACKED = (".gz", ".zst")
KNOWN = f"{', '.join(TEXT + RECORDS)} (also with {' or '.join(PACKED)} behind), {', '.join(TABLES)}"
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def find_files(source: str) -> tuple[Path, ...]:
    """The files of a source, sorted by path, none empty. UserError if there is nothing to read."""
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
        what = "only empty files" if found else f"no file that ends in {KNOWN}"
        raise UserError(f"{where} has {what}; give a file, a folder, a glob or {STDLIB!r}")
    return files


def form_of(path: Path) -> str:
    """The suffix that says what a file holds, without .gz or .zst; empty if none is known."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix in TEXT + RECORDS else ""
    return suffix if suffix in TEXT + RECORDS + TABLES else ""


def read_bytes(path: Path, what: str = "data file") -> bytes:
    """UserError if the file cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None


def _found(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _inside(path)
    if path.exists():
        if not form_of(path):
            raise UserError(f"data source {source!r} ends in {''.join(path.suffixes[-2:])!r}; known are {KNOWN}")
        return [path]
    if any(mark in source for mark in "*?["):
        named = [Path(name) for name in glob.glob(str(path), recursive=True)]
        return [path for path in named if form_of(path)]
    raise UserError(f"data source {source!r} does not exist; give a file, a folder, a glob or {STDLIB!r}")


def _inside(top: Path) -> list[Path]:
    """All files below a folder whose form is known; of folders that `datasets` saved, those that it lists."""
    found: list[Path] = []
    for folder, below, names in os.walk(top):
        here = Path(folder)
        if "dataset_dict.json" in names:
            splits = [str(split) for split in _listed(here / "dataset_dict.json", "splits")]
            raise UserError(f"{here} holds the splits {', '.join(splits)}; give the folder of one, e.g. {here / splits[0]}")
        if "state.json" in names and "dataset_info.json" in names:
            below.clear()
            listed = [here / str(entry.get("filename")) for entry in _listed(here / "state.json", "_data_files")]
            if absent := [path for path in listed if not path.is_file()]:
                raise UserError(f"{here} lacks {absent[0].name}, which its state.json lists; copy the whole folder")
            found += listed
        else:
            found += [here / name for name in names if form_of(Path(name))]
    return found


def _listed(path: Path, key: str) -> list[Any]:
    """The list that a file of `datasets` keeps under a key."""
    try:
        content = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    listed = content.get(key) if isinstance(content, dict) else None
    if not isinstance(listed, list) or not listed or content.get("_indices_data_files"):
        raise UserError(f"{path} lists no {key} that are rows as they stand; save it again with a recent `datasets`")
    return listed
