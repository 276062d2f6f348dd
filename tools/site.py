"""A hook of mkdocs: README, CONTRIBUTING and CHANGELOG are pages of the site too, without a second copy of their text.

A page that begins with  <!-- this page is ../README.md -->  shows that file. Links are written as they work in the repository,
and are turned here into those of the site; what they name outside of `docs` (examples, cluster files, the licence) goes along.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHOWN = re.compile(r"<!-- this page is \.\./(\S+) -->")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
BESIDE = ("examples", "clusters", "LICENSE")


def on_files(files: Files, config: Any) -> Files:
    """Adds what documents link to outside of `docs`, under the same name."""
    for name in BESIDE:
        path = ROOT / name
        for found in sorted(path.glob("*.*")) if path.is_dir() else [path]:
            files.append(File.generated(config, found.relative_to(ROOT).as_posix(), abs_src_path=str(found)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """The text of the file that this page is, if it is one; links that work here."""
    shown = SHOWN.match(markdown)
    folder = PurePosixPath(".") if shown else PurePosixPath("docs")
    if shown:
        markdown = (ROOT / shown[1]).read_text(encoding="utf-8")
    pages = {SHOWN.match(file.content_string): file for file in files.documentation_pages()}
    places = {found[1]: file.src_uri for found, file in pages.items() if found}

    def here(link: re.Match[str]) -> str:
        parts: list[str] = []
        for part in (folder / link[1]).parts:
            if part == ".." and parts:
                parts.pop()
            else:
                parts.append(part)
        path = "/".join(parts)
        return places.get(path) or (path.removeprefix("docs/"))

    return LINK.sub(here, markdown)
