"""Fixtures of the whole suite: pools of ranks that live as long as the session; and how tests are shared out to processes.

A file stays on one process, for what its tests share. All that needs the lab, or compares seconds, is one queue on one
process, begun first: two labs at once would share the cores that their bounds count on.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is loaded: on tensors this small its threads would only wait for each other, and for the ranks of the pools.
# And what is compiled is kept, even where the machine is told not to, or some hundred processes would compile the package anew.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from budget import Spent  # noqa: E402
from pool import Pool, start_server  # noqa: E402

# No deadline: on shared cores a single example may take any time. Derandomised: a run can be repeated.
settings.register_profile("thinwire", deadline=None, derandomize=True, database=None, max_examples=40)
settings.register_profile("quick", settings.get_profile("thinwire"), max_examples=15)
settings.load_profile("thinwire")

CASES = 2
"""Of a test with more of them, in `make test`, and one of those marked `heavy`; `make test-all` and CI run all."""
ON_RANKS = {"adapters", "bench", "collectives", "compress", "lab", "parallel", "sync", "tasks", "train"}
"""Folders in which a case takes real ranks, and so tenths of a second or more."""
_RANK_FIXTURES = {"ranks1", "ranks2", "ranks3", "ranks4", "ranks8"}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Spent(), "budget")
    if "not long" in (config.option.markexpr or ""):
        settings.load_profile("quick")


def queued(item: pytest.Item) -> bool:
    """Whether it belongs to the queue of the lab."""
    return any(item.get_closest_marker(name) for name in ("lab", "timed"))


def leave_most_cases_to_test_all(items: list[pytest.Item]) -> None:
    """Of a test with many cases that runs on ranks CASES stay, with the first and the last; of a heavy one the last. The others
    become long."""
    cases = defaultdict[tuple[Path, str], list[pytest.Item]](list)
    for item in items:
        if not item.get_closest_marker("long") and item.path.parent.name in ON_RANKS:
            cases[item.path, getattr(item, "originalname", item.name)].append(item)
    for several in cases.values():
        kept = {round(index * (len(several) - 1) / (CASES - 1)) for index in range(CASES)}
        if several[0].get_closest_marker("heavy"):
            kept = {len(several) - 1}
        for index, item in enumerate(several):
            if index not in kept:
                item.add_marker(pytest.mark.long)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The queue of the lab first, and each file as a whole."""
    if "not long" in (config.option.markexpr or ""):
        leave_most_cases_to_test_all(items)
    for item in items:
        item.add_marker(pytest.mark.xdist_group("lab" if queued(item) else item.path.stem))
    items.sort(key=lambda item: not queued(item))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the server load torch while the first tests run."""
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError(
            "pytest-xdist has not grouped the tests: several labs would run at once; take the pytest of constraints.txt"
        )

    def needs_server(item: pytest.Item) -> bool:
        return bool(_RANK_FIXTURES & set(getattr(item, "fixturenames", ()))) or hasattr(getattr(item, "module", None), "thinwire")

    if not session.config.option.collectonly and any(map(needs_server, session.items)):
        start_server()


def pool_of(world_size: int) -> Any:
    """A fixture: so many ranks, which live as long as the session."""

    @pytest.fixture(scope="session", name=f"ranks{world_size}")
    def pool() -> Iterator[Pool]:
        ranks = Pool(world_size)
        yield ranks
        ranks.close()

    return pool


ranks1, ranks2, ranks3, ranks4, ranks8 = map(pool_of, (1, 2, 3, 4, 8))
