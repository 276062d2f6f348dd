"""The documents of a file: whole files of plain text, or of each record what `data.field` asks for.

    content                   the string under a key; "meta.text" goes into objects, unless a key has that very name
    {prompt}\\n{response}      strings under several, in a template; {{ and }} are braces
    messages                  a list of objects with role and content: through the chat template

Every value has to be a string (or such a list): a record without one is bad.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinwire.data.chat import Chat
from thinwire.data.records import Bad, BadRecord, opened, records
from thinwire.data.source import TEXT, form_of
from thinwire.errors import UserError


class Unreadable:
    """Counts bad records where they are to be skipped; else the first is a UserError."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self.count, self.first = 0, ""

    def __call__(self, problem: str) -> None:
        """problem: file, place and what is wrong."""
        if not self._skip:
            raise UserError(f"{problem} (data.skip_bad = true skips such records)")
        self.count += 1
        self.first = self.first or problem

    def said(self) -> str:
        """How many, and the first."""
        return f"{self.count:,} unreadable record{'s' * (self.count > 1)} skipped; the first: {self.first}"


class Field:
    """What of a record is its text. `names`: the keys that it asks for. UserError for a template that is none."""

    def __init__(self, field: str, chat: Chat) -> None:
        self._chat = chat
        if "{" not in field and "}" not in field:
            self._parts: list[tuple[str, str | None]] = [("", field)]
        else:
            try:
                parsed = list(string.Formatter().parse(field))
            except ValueError as error:
                raise UserError(f"data.field = {field!r}: {error}; braces as text are {{{{ and }}}}") from None
            if any(name == "" or spec or conversion for _, name, spec, conversion in parsed):
                raise UserError(f"data.field = {field!r}: write a key alone between braces, as in '{{prompt}} {{response}}'")
            self._parts = [(literal, name) for literal, name, _, _ in parsed]
        self.names = [name for _, name in self._parts if name]
        if not self.names:
            raise UserError(f"data.field = {field!r} names no key; write one, or a template such as '{{prompt}} {{response}}'")

    def text(self, record: Any, where: str) -> bytes:
        """UTF-8. BadRecord if the record has no such text."""
        values = [(literal, self._value(record, name, where) if name else "") for literal, name in self._parts]
        try:
            return "".join(literal + value for literal, value in values).encode("utf-8")
        except UnicodeEncodeError:
            raise BadRecord(f"{where} holds half of a surrogate pair, which is no character") from None

    def _value(self, record: Any, name: str, where: str) -> str:
        if not isinstance(record, dict):
            raise BadRecord(f"{where} is {_kind(record)}, not an object with a {name!r}")
        value = record
        for key in [name] if name in record else name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise BadRecord(f"{where} has no {name!r}; it has {', '.join(list(record)[:10]) or 'no key'}")
            value = value[key]
        if isinstance(value, list) and value and all(isinstance(one, dict) and "role" in one for one in value):
            return self._chat.render(value, where)
        if not isinstance(value, str):
            raise BadRecord(f"{where} has {_kind(value)} under {name!r}, neither a string nor messages with a role")
        return value


def documents(path: Path, field: Field, bad: Bad) -> Iterator[tuple[str, bytes]]:
    """("data file PATH line N", text), none empty."""
    if form_of(path) in TEXT:
        with opened(path) as file:
            content = file.read()
        if content:
            yield f"data file {path}", content
        return
    for where, record in records(path, field.names, bad):
        try:
            text = field.text(record, where)
        except BadRecord as error:
            bad(str(error))
        else:
            if text:
                yield where, text


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "true or false"), ((int, float), "a number"), (str, "a string"), (list, "a list"), (dict, "an object"))
    return next((name for types, name in kinds if isinstance(value, types)), f"a {type(value).__name__}")
