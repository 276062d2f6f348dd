"""Headless Chromium for the tests of the page: pictures, and what a page measures of itself."""

import html
import re
import shutil
import subprocess
from pathlib import Path

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
]


def browser() -> str:
    """The path of Chromium; fails with what to install where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "Chromium is missing: install it (Debian, Ubuntu: apt-get install chromium)"
    return found


def screenshot(page: Path, picture: Path, width: int, height: int) -> None:
    """Write what `page` looks like in a window of that size to `picture` (PNG)."""
    _run(page, picture.parent, f"--window-size={width},{height}", f"--screenshot={picture}")


def framed(page_text: str, width: int, folder: Path) -> Path:
    """A page that shows `page_text` in a frame of `width` CSS pixels and notes what does not fit in there.

    A headless window is at least 500 pixels wide; a frame can be as narrow as a phone.
    """
    measure = """
      const seen = document.querySelector("iframe").contentDocument;
      const errors = [...seen.querySelectorAll("main *")].filter((e) => !e.closest("svg, .scroll, pre")
        && e.getBoundingClientRect().right > seen.documentElement.clientWidth + 1).map((e) => e.tagName);
      const texts = [...seen.querySelectorAll("svg text")].map((e) => e.getBoundingClientRect().height);
      const chart = seen.querySelector("svg[data-hover]"), box = chart.getBoundingClientRect();
      chart.dispatchEvent(new seen.defaultView.PointerEvent("pointermove", {clientX: box.right}));
      const readout = chart.closest("figure").querySelector(".readout").textContent;
      document.body.dataset.measured = JSON.stringify({client: seen.documentElement.clientWidth,
        scroll: seen.documentElement.scrollWidth, outside: errors, readout, text: texts.length ? Math.min(...texts) : null});
    """
    path = folder / f"framed-{width}.html"
    frame = f'<iframe style="width:{width}px;height:4000px;border:0" srcdoc="{html.escape(page_text)}"></iframe>'
    script = f"<script>addEventListener('load', () => {{{measure}}})</script>"
    path.write_text(f"<!doctype html><body style='margin:0'>{frame}{script}</body>", encoding="utf-8")
    return path


def measured(page: Path) -> str:
    """What a page made by `framed` noted, as JSON text."""
    dom = _run(page, page.parent, "--dump-dom")
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found, f"{page} noted nothing: {dom[-2000:]}"
    return html.unescape(found.group(1))


def _run(page: Path, folder: Path, *options: str) -> str:
    command = [browser(), *FLAGS, f"--user-data-dir={folder / 'chromium'}", *options, page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
