"""The records of one file, and where each stands in it.

    .jsonl              a JSON value a line
    .json               a list of records, or an object in which one value is such a list
    .csv  .tsv          a row a record, columns named by the first; quoted fields may go over lines (RFC 4180)
    .parquet  .arrow    a row a record; Arrow streams (what `datasets` saves) and Arrow files

Text forms are UTF-8, with a byte order mark or without, and may be packed (.gz, .zst). A record that cannot be read goes to
`bad`, with its line, or its number from 1; a file that is damaged as a whole is a UserError, since nobody could say how many of
its records are lost.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thinwire.data.source import TABLES, form_of
from thinwire.errors import UserError

BOM = b"\xef\xbb\xbf"
_LONGEST_FIELD = (1 << 31) - 1
_BUFFER_BYTES = 1 << 20
_ROWS = 1024

Bad = Callable[[str], None]
"""Called with file, place and what is wrong: counts or raises."""


class BadRecord(Exception):
    """One record of which no text can be had: file, place and what is wrong."""


def records(path: Path, names: Sequence[str], bad: Bad) -> Iterator[tuple[str, Any]]:
    """("data file PATH line N", record) for each. names: the keys that will be asked for; a table without one is a UserError."""
    form = form_of(path)
    if form in TABLES:
        yield from _rows(path, names, bad)
    elif form == ".json":
        yield from _listed(path)
    elif form == ".jsonl":
        yield from _json_lines(path, bad)
    else:
        yield from _separated(path, names, bad, "," if form == ".csv" else "\t")


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """What a text file holds, unpacked, at its first byte after a byte order mark. UserError if it cannot be read to its end."""
    try:
        with _open(path) as file:
            if file.peek(len(BOM)).startswith(BOM):
                file.read(len(BOM))
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path) -> io.BufferedReader:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path), _BUFFER_BYTES)  # type: ignore[arg-type]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_pyarrow(path).input_stream(str(path), compression="zstd"), _BUFFER_BYTES)
    return open(path, "rb")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"data file {path} needs the pyarrow library; pip install 'thinwire[data]'") from None
    return pyarrow


def _json_lines(path: Path, bad: Bad) -> Iterator[tuple[str, Any]]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    record = _json(line.rstrip(), number)
                except ValueError as error:
                    bad(f"data file {path} {error}")
                else:
                    yield f"data file {path} line {number}", record


def _listed(path: Path) -> Iterator[tuple[str, Any]]:
    with opened(path) as file:
        content = file.read()
    try:
        found = _json(content, 1)
    except ValueError as error:
        hint = "; with a record a line, name it .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"data file {path} {error}{hint}") from None
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and isinstance((value or [0])[0], dict)]
        found = lists[0] if len(lists) == 1 else None
    if not isinstance(found, list):
        raise UserError(f"data file {path} needs a list of records, or an object with one such list")
    for number, record in enumerate(found, start=1):
        yield f"data file {path} record {number}", record


def _json(content: bytes, first_line: int) -> Any:
    """ValueError that begins with the line."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        before = content[: error.start].split(b"\n")
        raise ValueError(f"line {first_line + len(before) - 1} is not UTF-8 at byte {len(before[-1])}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {first_line + error.lineno - 1} is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {first_line} is JSON that cannot be read: {error}") from None


def _separated(path: Path, names: Sequence[str], bad: Bad, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    wrong: list[str] = []

    def decoded(file: Iterable[bytes]) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                wrong.append(f"data file {path} line {number} is not UTF-8 at byte {error.start}")
                yield line.decode("utf-8", "replace")

    header: list[str] = []
    with opened(path) as file:
        reader = csv.reader(decoded(file), delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(f"data file {path} line {line} is not {form_of(path)[1:].upper()}: {error}") from None
            if row is None:
                return
            if not header:
                if wrong:
                    raise UserError(wrong[0])
                header = row
                _columns(path, names, header)
            elif wrong:
                bad(wrong[0])
                wrong.clear()
            elif row and len(row) != len(header):
                bad(f"data file {path} line {line} has {len(row)} fields, and the first line {len(header)}")
            elif row:
                yield f"data file {path} line {line}", dict(zip(header, row, strict=True))


def _rows(path: Path, names: Sequence[str], bad: Bad) -> Iterator[tuple[str, Any]]:
    """Only the columns that are asked for are read."""
    pyarrow, number = _pyarrow(path), 0
    try:
        for batch in _batches(pyarrow, path, names):
            for row in range(batch.num_rows):
                number += 1
                where = f"data file {path} record {number}"
                try:
                    record = {name: batch.column(name)[row].as_py() for name in batch.schema.names}
                except ValueError as error:
                    bad(f"{where} cannot be read: {error}")
                else:
                    yield where, record
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        after = f" after record {number}" if number else ""
        raise UserError(f"data file {path} cannot be read{after}: {reason}") from None


def _batches(pyarrow: Any, path: Path, names: Sequence[str]) -> Iterator[Any]:
    with open(path, "rb") as file:
        if form_of(path) == ".parquet":
            table = pyarrow.parquet.ParquetFile(file)
            columns = _columns(path, names, table.schema_arrow.names)
            yield from table.iter_batches(_ROWS, columns=columns, use_threads=False)
            return
        begins = file.read(6)
        file.seek(0)
        if begins == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = reader = pyarrow.ipc.open_stream(file)
        columns = _columns(path, names, reader.schema.names)
        for batch in batches:
            yield batch.select(columns)


def _columns(path: Path, names: Sequence[str], present: Sequence[str]) -> list[str]:
    """Those that hold the names: of "meta.text" the column of that very name, or "meta"."""
    columns = [name if name in present else name.split(".")[0] for name in names]
    for name, column in zip(names, columns, strict=True):
        if column not in present:
            raise UserError(f"data file {path} has no column {name!r}; it has {', '.join(present)}; set data.field")
    return list(dict.fromkeys(columns))
