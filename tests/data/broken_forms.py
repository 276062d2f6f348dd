"""Data as it should not be: what is in the file, options beside its name, and the line that is said ({path}: the file's)."""

import gzip
import json
from typing import Any

from every_form import NESTED, arrow, jsonl, parquet, separated

FINE = [{"id": str(number), "text": f"document {number} " * 20} for number in range(40)]
CHAT = [{"messages": [{"role": "user", "content": f"Hello {number} " * 9}]} for number in range(40)]
SKIPS = " (data.skip_bad = true skips such records)"
STRICT = "{% for m in messages %}{{ m.content if m.role != 'system' else raise_exception('no system') }}{% endfor %}"
NOT_TEXT = "under 'text', neither a string nor messages with a role"
LINES = jsonl(FINE)

BAD_RECORDS: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "cut.jsonl": (LINES + b'{"text": "docu', {}, "line 41 is not JSON: Unterminated string starting at column 10"),
    "missing.jsonl": (LINES + b'{"body": 1, "title": 2}\n', {}, "line 41 has no 'text'; it has body, title"),
    "number.jsonl": (
        LINES + b'{"text": 7}\n',
        {},
        f"line 41 has a number {NOT_TEXT}",
    ),
    "null.jsonl": (LINES + b'{"text": null}\n', {}, f"line 41 has null {NOT_TEXT}"),
    "list.jsonl": (LINES + b"\n[1]\n", {}, "line 42 is a list, not an object with a 'text'"),
    "bytes.jsonl": (LINES + b'{"text": "\xff"}\n', {}, "line 41 is not UTF-8 at byte 10"),
    "half.jsonl": (LINES + b'{"text": "\\ud800"}\n', {}, "line 41 holds half of a surrogate pair, which is no character"),
    "deep.jsonl": (
        LINES + b"[" * 200_000 + b"\n",
        {},
        "line 41 is JSON that cannot be read: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
    ),
    "template.jsonl": (LINES + b'{"text": "x"}\n', {"field": "{text} {id}"}, "line 41 has no 'id'; it has text"),
    "record.json": (json.dumps([*FINE, "x"]).encode(), {}, "record 41 is a string, not an object with a 'text'"),
    "short.csv": (separated(FINE, ",") + b"7\r\n", {}, "line 42 has 1 fields, and the first line 2"),
    "bytes.tsv": (separated(FINE, "\t") + b"41\t\xe9\n", {}, "line 42 is not UTF-8 at byte 3"),
    "null.parquet": (
        parquet([*FINE, {"id": "1", "text": None}]),
        {},
        f"record 41 has null {NOT_TEXT}",
    ),
    "system.jsonl": (
        jsonl([*CHAT, {"messages": [{"role": "system", "content": ""}]}]),
        {"field": "messages", "chat_template": STRICT},
        "line 41 does not fit the chat template: no system",
    ),
}
"""One record that `skip_bad` can leave out."""

BAD_FILES: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "empty.txt": (b"", {}, "data source '{path}' has only empty files; give a file, a folder, a glob or 'stdlib'"),
    "header.csv": (b"id,text\n", {}, "data source '{path}' holds no text"),
    "unknown.docx": (
        b"PK",
        {},
        "data source '{path}' ends in '.docx'; known are .txt, .md, .py, .jsonl, .json, .csv, .tsv (also with .gz or .zst "
        "behind), .parquet, .arrow",
    ),
    "cut.jsonl.gz": (
        gzip.compress(LINES)[:-20],
        {},
        "data file {path} cannot be read: Compressed file ended before the end-of-stream marker was reached",
    ),
    "not.txt.gz": (b"plain text", {}, "data file {path} cannot be read: Not a gzipped file (b'pl')"),
    "cut.jsonl.zst": (NESTED["a.jsonl.zst"](FINE)[:-20], {}, "data file {path} cannot be read: Truncated compressed stream"),
    "cut.parquet": (
        parquet(FINE)[:-9],
        {},
        "data file {path} cannot be read: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a "
        "parquet file.",
    ),
    "cut.arrow": (
        arrow(FINE)[:-600],
        {},
        "data file {path} cannot be read after record 35: Expected to be able to read 1264 bytes for message body, got 672",
    ),
    "columns.csv": (
        separated(FINE, ","),
        {"field": "content"},
        "data file {path} has no column 'content'; it has id, text; set data.field",
    ),
    "columns.parquet": (
        parquet(FINE),
        {"field": "{txt} {id}"},
        "data file {path} has no column 'txt'; it has id, text; set data.field",
    ),
    "quote.csv": (separated(FINE, ",") + b'7,"open\n\n', {}, "data file {path} line 42 is not CSV: unexpected end of data"),
    "utf16.csv": ("id,text\n".encode("utf-16"), {}, "data file {path} line 1 is not UTF-8 at byte 0"),
    "cut.json": (
        json.dumps(FINE, indent=1).encode()[:-9],
        {},
        "data file {path} line 160 is not JSON: Unterminated string starting at column 11",
    ),
    "lines.json": (
        LINES,
        {},
        "data file {path} line 2 is not JSON: Extra data at column 1; with a record a line, name it .jsonl",
    ),
    "two.json": (
        b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}',
        {},
        "data file {path} needs a list of records, or an object with one such list",
    ),
    "chat.jsonl": (
        jsonl(CHAT),
        {"field": "messages"},
        "data file {path} line 1 holds messages, and tokenizer 'bytes' has no chat template; set data.chat_template to a Jinja "
        "file, or data.tokenizer to a tokenizer.json with its tokenizer_config.json beside it",
    ),
    "syntax.jsonl": (
        jsonl(CHAT),
        {"field": "messages", "chat_template": "{% for m in messages %}\n{{ m.content }"},
        "chat template {template}: line 2: unexpected '}}'",
    ),
    "braces.jsonl": (
        LINES,
        {"field": "{text"},
        "data.field = '{{text': expected '}}' before end of string; braces as text are {{{{ and }}}}",
    ),
    "conversion.jsonl": (
        LINES,
        {"field": "{text!r}"},
        "data.field = '{{text!r}}': write a key alone between braces, as in '{{prompt}} {{response}}'",
    ),
    "literal.jsonl": (
        LINES,
        {"field": "{{text}}"},
        "data.field = '{{{{text}}}}' names no key; write one, or a template such as '{{prompt}} {{response}}'",
    ),
}
"""Nothing can be had from these."""
