"""The promises of the house that README and CONTRIBUTING make, checked on the sources themselves."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "thinwire"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
FOLDERS = ("src", "tests", "tools", "docs", "clusters", "examples", ".ci")
WRITTEN = [
    path
    for path in [*ROOT.glob("*"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    if path.is_file()
    and path.name != ".git"  # of a linked worktree
    and path.suffix in ("", ".py", ".md", ".toml", ".txt", ".css", ".js")
    and not {".hypothesis", "__pycache__"} & set(path.parts)
]
"""What people wrote, without what tools left."""

DOCUMENTS = [*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]

MAX_LINES = 400
README_LINES = 150
FLOOR_LINES = {"parallel": 4000, "plan": 5000, "adapters": 3500, "tasks": 3000}
"""What floors that still grow, or are still to come, may come to."""
HELP_S = 0.3

ENVIRONMENT_READERS = {"environment.py"}
FOREIGN_PROGRAMS = re.compile(r"bench/peers/plain_\w+\.py")
"""Benchmark peers stand for other people's programs: no thinwire in the process, so they read torchrun's variables themselves."""


def name(path: Path) -> str:
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()


def run(*arguments: str, timeout_s: float = 50) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.parametrize("path", [*SOURCES, *TOOLS], ids=name)
def test_a_source_file_is_short_documented_and_without_global(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the module has no docstring"
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]
    public = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef))
    assert not [node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)]


@pytest.mark.parametrize("floor", FLOOR_LINES)
def test_a_floor_is_as_small_as_was_promised(floor) -> None:
    folders = ("adapters", "horovod") if floor == "adapters" else (floor,)  # the package that users import is theirs
    files = [path for folder in folders for path in (PACKAGE / folder).rglob("*.py")]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert lines <= FLOOR_LINES[floor]


def environment_lines(path: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv"):
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os" and {"environ", "getenv"} & {a.name for a in node.names}:
            yield node.lineno


def test_the_environment_is_read_in_one_file() -> None:
    found = {name(path): list(environment_lines(path)) for path in SOURCES}
    readers = {path for path, lines in found.items() if lines and not FOREIGN_PROGRAMS.fullmatch(path)}
    assert readers <= ENVIRONMENT_READERS, {path: found[path] for path in readers - ENVIRONMENT_READERS}


def test_axes_are_applied_to_a_model_by_one_function() -> None:
    """And so in one order."""
    call = re.compile(r"\b(tensor|sequence|experts|recompute|sharded|plans)\.apply\(")
    assert {name(path) for path in SOURCES if call.search(path.read_text(encoding="utf-8"))} == {"parallel/apply.py"}


def test_nothing_points_outside_of_the_repository() -> None:
    outside = re.compile(r"(?<![\w.])/wor" + r"k/|\bshar" + r"ed/")
    assert not [str(path.relative_to(ROOT)) for path in WRITTEN if outside.search(path.read_text(encoding="utf-8"))]


def test_the_readme_is_one_page() -> None:
    long = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("README*.md")}
    assert set(long) == {"README.md", "README.zh.md"} and max(long.values()) <= README_LINES, long


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_documents_point_to_what_is_there(path) -> None:
    """Relative links, and paths in backticks that begin at a folder of the repository."""
    text = path.read_text(encoding="utf-8")
    links = [path.parent / link for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)]
    named = [ROOT / found for found in re.findall(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]+)`", text)]
    assert not [str(target) for target in (*links, *named) if not target.exists()]


def test_shown_output_says_where_it_comes_from() -> None:
    """Each block with a command is live, or names a commit; `make outputs CHECK=1` runs those that are live."""
    shown = subprocess.run(
        [sys.executable, "-c", "import outputs; print(sum(len(list(outputs.blocks(path))) for path in outputs.documents()))"],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert shown.returncode == 0 and int(shown.stdout) > 5, shown.stderr


def test_imports_go_down_only() -> None:
    done = run("-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache", "--no-logo")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_code_is_in_form() -> None:
    for arguments in (["check", "."], ["format", "--check", "."]):
        done = run("-m", "ruff", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


IMPORT_ALL = """
import os, pkgutil, sys, threading
import thinwire
import torch.distributed.pipelining  # which loads torch._dynamo, and that names its cache in the environment
before = os.getcwd(), dict(os.environ), threading.active_count(), os.listdir()
for module in pkgutil.walk_packages(thinwire.__path__, "thinwire."):
    names = "accelerate", "jax", "lightning", "tensorflow", "transformers"  # derive from extras, as those of Horovod do
    doors = ["adapters." + name for name in names] + ["jax", "horovod.tensorflow", "horovod.keras"]
    if not module.name.startswith(("thinwire.bench.peers.", *("thinwire." + name for name in doors))):
        __import__(module.name)
assert (os.getcwd(), dict(os.environ), threading.active_count(), os.listdir()) == before
print(sum(name.startswith("thinwire") for name in sys.modules), file=sys.stderr)
"""


@pytest.mark.long
@pytest.mark.timeout(250)
def test_importing_modules_has_no_side_effect() -> None:
    done = run("-W", "error::UserWarning:thinwire", "-c", IMPORT_ALL, timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and int(done.stderr) > 50


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = {list(arguments)!r}\n"
    return run("-c", program + "from thinwire.cli.main import main; main()")


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["lab"], ["lab", "run"], ["lab", "check"], ["report"], ["bench"], ["collectives", "explain"], ["horovodrun"]],
    ids=" ".join,
)
def test_help_needs_no_torch(command) -> None:
    done = without_torch(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout and (not command or command[-1] in done.stdout)


def test_help_is_quick() -> None:
    """In seconds of the processor, so that neighbours on it do not count; where it is slow, beside what it must load."""

    def used_s(command: Callable[[], subprocess.CompletedProcess[str]]) -> float:
        before = os.times()
        assert command().returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    help_s = min(used_s(lambda: without_torch("--help")) for _ in range(3))
    assert help_s < HELP_S or help_s < 2 * min(used_s(lambda: run("-c", "import typer.rich_utils")) for _ in range(3))


def test_what_is_pinned_is_what_is_asked_for() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    asked = re.findall(r'^    "([\w-]+)[><=]', (ROOT / "pyproject.toml").read_text(), re.M)
    assert pins["torch"] == "2.13.0"
    assert not {package.replace("-", "_").lower() for package in asked} - {p.replace("-", "_").lower() for p in pins}
    assert not any(package.startswith("nvidia") for package in pins)


def test_continuous_integration_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], timeout=10).returncode == 0
