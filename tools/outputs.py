"""What README and docs show as output is made by the command that they show: `make outputs`, `make outputs CHECK=1`.

Such a block begins with ```console and `$ COMMAND`, and right above it stands what it is:

    <!-- output: live -->                      run COMMAND and put in place what it prints
    <!-- output: recorded in 3831da3 -->       takes more than a minute: left alone; the commit that brought it

Behind `live`, after semicolons:

    keep: REGEX        of what is printed these lines only; "..." stands for others
    varies: REGEX      what differs between machines: put in place, but not compared
    fails              the command is shown because it ends with an error

Commands run in the root of the repository, on this checkout, 100 columns wide, standard output and standard error as one.
"""

import argparse
import difflib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 300
"""A command that takes a minute by itself may take several on a machine that has other things to do."""
BLOCK = re.compile(
    r"(?:^<!-- output: (?P<about>[^\n]+) -->\n)?^```console\n\$ (?P<command>[^\n]+)\n(?P<shown>.*?)^```$", re.M | re.S
)
RECORDED = re.compile(r"recorded in [0-9a-f]{7,40}")


class OutputError(Exception):
    """One line for whoever writes documents."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Of a document: `shown` lies at text[span[0]:span[1]]."""

    place: str
    """README.md:40"""
    command: str
    shown: str
    span: tuple[int, int]
    live: bool
    keep: str | None = None
    varies: str | None = None
    fails: bool = False

    def made(self) -> str:
        """What the command prints now, shortened as the block asks for."""
        code, printed = run(self.command)
        if bool(code) != self.fails:
            raise OutputError(f"{self.place}: $ {self.command} ended with {code}:\n{printed}")
        return shortened(printed, self.keep)

    def compared(self, text: str) -> list[str]:
        """The lines of `text`, without what may differ."""
        return (re.sub(self.varies, "~", text) if self.varies else text).splitlines()


def documents() -> list[Path]:
    """Where output is shown."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path) -> Iterator[Block]:
    """Those of one document. OutputError for one that does not say what it is."""
    text = path.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        place = f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, found.start('command')) + 1}"
        about = found["about"]
        if about is None:
            raise OutputError(f"{place}: a block of output with no <!-- output: ... --> right above it; see tools/outputs.py")
        kind, *rest = about.split("; ")
        settings = dict(one.split(": ", 1) if ": " in one else (one, "") for one in rest)
        if not (kind == "live" or RECORDED.match(kind)) or not settings.keys() <= {"keep", "varies", "fails"}:
            raise OutputError(f"{place}: <!-- output: {about} --> is not understood; see tools/outputs.py")
        yield Block(
            place=place,
            command=found["command"],
            shown=found["shown"],
            span=found.span("shown"),
            live=kind == "live",
            keep=settings.get("keep"),
            varies=settings.get("varies"),
            fails="fails" in settings,
        )


def environment() -> dict[str, str]:
    """Of the commands: this checkout and this Python first, no colours, ranks that meet on loopback."""
    dropped = ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    fixed = {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100", "NO_COLOR": "1", "PYTHONUTF8": "1"}
    return kept | fixed | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}


@cache
def run(command: str) -> tuple[int, str]:
    """Exit code, and what it prints; each command once."""
    print(f"$ {command}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            shlex.split(command),
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise OutputError(f"$ {command} takes more than {LIMIT_S} s; say with which commit it ran instead") from None
    return done.returncode, done.stdout


def shortened(printed: str, keep: str | None) -> str:
    """The lines that match `keep`, and "..." wherever others were left out; no blanks at ends."""
    found: list[str] = []
    for line in printed.strip("\n").splitlines():
        if keep is None or re.search(keep, line):
            found.append(line.rstrip())
        elif found[-1:] != ["..."] and line.strip():
            found.append("...")
    return "\n".join(found).strip() + "\n"


def check(path: Path) -> list[str]:
    """A diff for each live block that shows something else than its command prints."""
    wrong = []
    for block in blocks(path):
        if block.live:
            shown, made = block.compared(block.shown), block.compared(block.made())
            if shown != made:
                wrong += [f"{block.place}: $ {block.command}", *list(difflib.unified_diff(shown, made, lineterm="", n=1))[2:]]
    return wrong


def update(path: Path) -> bool:
    """Put in place what live commands print; what merely varies stays as it is. Whether the document has changed."""
    text = before = path.read_text(encoding="utf-8")
    for block in reversed(list(blocks(path))):
        if block.live and block.compared(made := block.made()) != block.compared(block.shown):
            text = text[: block.span[0]] + made + text[block.span[1] :]
    if text != before:
        path.write_text(text, encoding="utf-8")
    return text != before


def main() -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description="Put the output of shown commands in place.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something is out of place")
    only_check = parser.parse_args().check
    try:
        if only_check:
            wrong = [line for path in documents() for line in check(path)]
            print("\n".join(wrong) if wrong else "all shown output is what the commands print")
            return int(bool(wrong))
        changed = [str(path.relative_to(ROOT)) for path in documents() if update(path)]
        print(f"changed: {', '.join(changed)}" if changed else "nothing has changed")
    except OutputError as error:
        print(f"outputs: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
