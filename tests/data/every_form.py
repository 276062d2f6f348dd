"""The same records written in every form that is read."""

import csv
import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Records = list[dict[str, Any]]


def jsonl(records: Records) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def separated(records: Records, delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().encode()


def parquet(records: Records) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), out, row_group_size=7)
    return out.getvalue()


def arrow(records: Records, kind: Callable[..., Any] = pyarrow.ipc.new_stream) -> bytes:
    table, out = pyarrow.Table.from_pylist(records), io.BytesIO()
    with kind(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as file:
        file.write(content)
    return out.getvalue().to_pybytes()


BOM = "\ufeff".encode()

FLAT: dict[str, Callable[[Records], bytes]] = {
    "a.csv": lambda records: separated(records, ","),
    "bom.csv": lambda records: BOM + separated(records, ","),
    "a.csv.gz": lambda records: gzip.compress(separated(records, ",")),
    "a.tsv": lambda records: separated(records, "\t"),
}
"""Forms that have strings alone."""

NESTED: dict[str, Callable[[Records], bytes]] = {
    "a.jsonl": jsonl,
    "bom.jsonl": lambda records: BOM + jsonl(records),
    "a.jsonl.gz": lambda records: gzip.compress(jsonl(records)),
    "a.jsonl.zst": lambda records: zstd(jsonl(records[:9])) + zstd(jsonl(records[9:])),
    "a.json": lambda records: json.dumps(records, indent=1).encode(),
    "object.json": lambda records: json.dumps({"version": [1], "data": records}).encode(),
    "a.json.zst": lambda records: zstd(BOM + json.dumps(records).encode()),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "file.arrow": lambda records: arrow(records, pyarrow.ipc.new_file),
}


def write_saved(folder: Path, records: Records) -> Path:
    """As `save_to_disk` of the `datasets` library does, in two files, beside what else that library may leave there."""
    folder.mkdir(parents=True)
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (records[:11], records[11:]), strict=True):
        (folder / name).write_bytes(arrow(part))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    shutil.copy(folder / names[0], folder / "cache-0123456789abcdef.arrow")
    return folder
