"""Headless Chromium for the tests of the page: pictures, and what a page measures of itself."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def framed(page_text: str, widths: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """What `page_text` measures of itself in frames of those widths (CSS pixels): one dict each.

    A headless window is at least 500 pixels wide; a frame can be as narrow as a phone.
    """
    measure = """
      document.body.dataset.measured = JSON.stringify([...document.querySelectorAll("iframe")].map((frame) => {
        const seen = frame.contentDocument;
        const errors = [...seen.querySelectorAll("main *")].filter((e) => !e.closest("svg, .scroll, pre")
          && e.getBoundingClientRect().right > seen.documentElement.clientWidth + 1).map((e) => e.tagName);
        const texts = [...seen.querySelectorAll("svg text")].map((e) => e.getBoundingClientRect().height);
        const chart = seen.querySelector("svg[data-hover]"), box = chart.getBoundingClientRect();
        chart.dispatchEvent(new seen.defaultView.PointerEvent("pointermove", {clientX: box.right}));
        const readout = chart.closest("figure").querySelector(".readout").textContent;
        return {client: seen.documentElement.clientWidth, scroll: seen.documentElement.scrollWidth, outside: errors, readout,
          text: texts.length ? Math.min(...texts) : null};
      }));
    """
    path, content = folder / "framed.html", html.escape(page_text)
    frames = "".join(f'<iframe style="width:{width}px;height:4000px;border:0" srcdoc="{content}"></iframe>' for width in widths)
    script = f"<script>addEventListener('load', () => {{{measure}}})</script>"
    path.write_text(f"<!doctype html><body style='margin:0'>{frames}{script}</body>", encoding="utf-8")
    dom = _run(path, folder, "--dump-dom")
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found, f"{path} noted nothing: {dom[-2000:]}"
    measured: list[dict[str, Any]] = json.loads(html.unescape(found.group(1)))
    return measured


def _run(page: Path, folder: Path, *options: str) -> str:
    command = [browser(), *FLAGS, f"--user-data-dir={folder / 'chromium'}", *options, page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
