"""How far the ranks of a benchmark are: rank 0 appends lines to a file, and a thread shows the last one on stderr.

A file, because ranks in a lab share nothing else with the process that started them.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

POLL_S = 0.5


def tell(path: Path, done: float, total: int, what: str) -> None:
    """Rank 0: `done` of `total` parts are over."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"done": done, "total": total, "what": what}) + "\n")


@contextmanager
def shown(path: Path, title: str) -> Iterator[None]:
    """While inside: a bar in a terminal, a line for each that was told elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, ended = progress.add_task("starting"), threading.Event()

        def watch() -> None:
            seen, over = 0, False
            while not over:
                over = ended.wait(POLL_S)
                text = path.read_text(encoding="utf-8") if path.is_file() else ""
                lines = text.rpartition("\n")[0].splitlines()  # the last one may be half written
                for line in lines[seen:]:
                    told = json.loads(line)
                    progress.update(task, completed=told["done"], total=told["total"], description=told["what"])
                    if not console.is_terminal:
                        console.print(f"{title}: {told['done']:.3g} of {told['total']}: {told['what']}", highlight=False)
                seen = len(lines)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
