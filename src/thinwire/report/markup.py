"""HTML and SVG by function call: what is not markup already is escaped, so no text can break the page."""

from collections.abc import Iterable
from html import escape

_VOID = {"meta", "br", "hr", "col", "img"}


class Markup(str):
    """Text that is markup; everything else is escaped by `tag`."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """An element. `class_` is class, other underscores are hyphens; None and False leave an attribute or child out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[str | None], between: str = "") -> Markup:
    """Children one after the other, text among them escaped."""
    parts = (child if isinstance(child, Markup) else escape(child) for child in children if child is not None)
    return Markup(between.join(parts))


def _plain(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "true"
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
