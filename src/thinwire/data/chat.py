"""Messages into text by a chat template: a Jinja template over `messages` and the names of the special tokens, rendered in a
sandbox with the settings and helpers of `apply_chat_template` in the Hugging Face `transformers` library.

One helper is left out: `strftime_now`. Documents would differ by the day, and by the rank; templates that can do without take
the date that they name.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from thinwire.data.records import BadRecord
from thinwire.data.source import read_bytes
from thinwire.errors import UserError

_BESIDE = ("chat_template.jinja", "tokenizer_config.json")


class Chat:
    """template: path of a Jinja file; empty: what lies beside the tokenizer.json. Nothing is parsed until messages come."""

    def __init__(self, template: str, tokenizer: str) -> None:
        self._tokenizer = tokenizer
        beside = [Path(tokenizer).expanduser().parent / name for name in _BESIDE] if tokenizer.endswith(".json") else []
        given = [Path(template).expanduser()] if template else []
        self._files = {path: read_bytes(path, "chat template") for path in (*given, *beside) if path in given or path.is_file()}

    @property
    def identity(self) -> str:
        """Differs where templates or special tokens do."""
        return hashlib.sha256(b"\0".join(self._files.values())).hexdigest()

    def render(self, messages: list[dict[str, Any]], where: str) -> str:
        """BadRecord for messages that the template refuses; UserError if there is no template."""
        import jinja2

        if self._template is None:
            raise UserError(
                f"{where} holds messages, and tokenizer {self._tokenizer!r} has no chat template; set data.chat_template to a "
                "Jinja file, or data.tokenizer to a tokenizer.json with its tokenizer_config.json beside it"
            )
        values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False, **self._tokens}
        try:
            return self._template.render(values)
        except jinja2.TemplateError as error:
            raise BadRecord(f"{where} does not fit the chat template: {error.message}") from None
        except Exception as error:  # a template computes as it likes
            raise BadRecord(f"{where} does not fit the chat template: {type(error).__name__}: {error}") from None

    @cached_property
    def _config(self) -> dict[str, Any]:
        for path, content in self._files.items():
            if path.name == "tokenizer_config.json":
                try:
                    config = json.loads(content)
                except ValueError as error:
                    raise UserError(f"{path} is not JSON: {error}") from None
                return config if isinstance(config, dict) else {}
        return {}

    @property
    def _tokens(self) -> dict[str, str]:
        """bos_token and the like."""
        named = {key: value for key, value in self._config.items() if key.endswith("_token")}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        return {key: text for key, text in texts.items() if isinstance(text, str)}

    @cached_property
    def _template(self) -> Any:
        found = self._text()
        if found is None:
            return None
        path, text = found
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %} marks what an assistant says; to us it is text as any other."""

            tags = {"generation"}  # noqa: RUF012 (as the base class has it)

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        environment.filters["tojson"] = as_json
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template {path}: line {error.lineno}: {error.message}") from None

    def _text(self) -> tuple[Path, str] | None:
        for path, content in self._files.items():
            if path.name != "tokenizer_config.json":
                try:
                    return path, content.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"chat template {path} is not UTF-8 at byte {error.start}") from None
        found = self._config.get("chat_template")
        if isinstance(found, list):  # several by name
            found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None)
        return (list(self._files)[-1], found) if isinstance(found, str) else None
