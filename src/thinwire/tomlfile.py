"""TOML files in, and one line out for whatever is wrong with them: the file, the key, the value, what is allowed."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from thinwire.errors import UserError

Schema = TypeVar("Schema", bound=BaseModel)


class Section(BaseModel):
    """A table of a file: no other keys than its own, and it stays as it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_toml(path: Path) -> dict[str, Any]:
    """The file's content. UserError if it is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def read_value(text: str) -> Any:
    """What stands behind a key; what TOML cannot read is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def put(content: dict[str, Any], key: str, value: Any, where: str) -> None:
    """At a key such as "train.steps" of nested tables. UserError, which names `where`, if a value stands in its way."""
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise UserError(f"{where}: {section!r} is a value, not a section")
    content[last] = value


def validate(schema: type[Schema], content: dict[str, Any], where: str) -> Schema:
    """Check `content` against `schema`; the first thing wrong becomes a UserError that names `where` and the key."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise UserError(_one_line(error, schema, where)) from None


def _one_line(error: ValidationError, schema: type[BaseModel], where: str) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(str(part) for part in _without_tags(schema, first["loc"]))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        owner = _schema_at(schema, first["loc"][:-1])
        allowed = f"; allowed: {', '.join(owner.model_fields)}" if owner else ""
        return f"{where}: unknown key {key}{allowed}{more}"
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        return f"{where}: {key}.kind = {context['tag']!r}: there are {context['expected_tags']}{more}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing{more}"
    if first["type"] in ("value_error", "assertion_error"):
        return f"{where}: {f'{key}: ' if key else ''}{first['ctx']['error']}{more}"
    return f"{where}: {key} = {_short(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}{more}"


def _without_tags(schema: type[BaseModel], loc: tuple[str | int, ...]) -> list[str | int]:
    """`loc` as the file has it: without the kinds that select members of a union."""
    kept: list[str | int] = []
    for index, part in enumerate(loc):
        owner = _schema_at(schema, loc[:index])
        is_field = owner is None or isinstance(part, int) or part in owner.model_fields
        if is_field or _schema_at(schema, loc[: index + 1]) is None:
            kept.append(part)
    return kept


def _schema_at(schema: type[BaseModel], loc: tuple[str | int, ...]) -> type[BaseModel] | None:
    """The model that owns the keys at `loc`: follows fields, list items and the tag of a union."""
    current: type[BaseModel] | None = schema
    options: list[type[BaseModel]] = []
    for part in loc:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if current else None
        field = field or next((f for f in (current.model_fields.values() if current else ()) if f.alias == part), None)
        if field is not None:
            options = list(_models_in(field.annotation))
            current = options[0] if options else None
        else:
            current = next((model for model in options if _is_kind(model, part)), None)
    return current


def _is_kind(model: type[BaseModel], tag: str) -> bool:
    """Whether `tag` selects this member of a union."""
    return "kind" in model.model_fields and tag in get_args(model.model_fields["kind"].annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
