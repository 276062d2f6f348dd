"""One self-contained HTML page for a run folder: no request leaves it, so it opens offline and can be mailed."""

from importlib import resources
from pathlib import Path

from thinwire.record import RunFolder
from thinwire.report import sections
from thinwire.report.facts import Facts, gather
from thinwire.report.markup import Markup, tag

SECTIONS = (
    sections.loss,
    sections.step,
    sections.sent,
    sections.network,
    sections.assumptions,
    sections.settings,
)


def write_report(folder: RunFolder) -> Path:
    """Write report.html into the run folder and return its path. UserError if the folder is damaged."""
    folder.write_text("report.html", page(gather(folder)))
    return folder.path / "report.html"


def page(facts: Facts) -> str:
    """The page as text."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{facts.name} · thinwire"),
        tag("style", _asset("page.css")),
    )
    body = tag(
        "body",
        tag("main", sections.headline(facts), *(section(facts) for section in SECTIONS)),
        tag("script", _asset("page.js")),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _asset(name: str) -> Markup:
    return Markup((resources.files("thinwire.report") / name).read_text(encoding="utf-8"))
