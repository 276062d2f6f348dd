"""PyTorch's own tests of torch.distributed, which its wheel ships, with our backend in gloo's place: `make conformance`.

    python tools/conformance.py [metered|chosen] [NAME ...]      both, and all tests, if none is named

metered: gloo's own collectives behind the meter; chosen: by price alone, so that schedules of ours run and the choice is the same
each time. Three ranks, forked for each test. A test asks for "gloo" and gets our group; `dist.get_backend` still answers "gloo",
by which the tests choose what applies. In traces a call that a schedule of ours has run is an event of ours, so a test that looks
for gloo's event also finds that one. Tests that torch skips on gloo without a GPU are not counted.

Ends with 1 if a test fails that is not listed in EXPECTED, or one passes that is.
"""

import logging
import os
import sys
import tempfile
import unittest
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
os.environ.setdefault("TEMP_DIR", tempfile.mkdtemp(prefix="conformance-"))
os.environ.setdefault("INIT_METHOD", f"file://{os.environ['TEMP_DIR']}/meet")

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed import distributed_test as suite

from thinwire.collectives.backend import NAME
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.scheduled import register_scheduled
from thinwire.collectives.tuned.tuner import make_tuner

MODES = ("metered", "chosen")
EXPECTED = {
    "test_get_backend": "asks a group for the name of its backend, which is thinwire",
    "test_ddp_logging_data_cpu": "asks DistributedDataParallel's log for the name of the backend, which is thinwire",
}
"""Tests that cannot pass, with the reason."""


def take_the_place_of_gloo(mode: str) -> None:
    """In this process, from now on: who asks c10d for gloo gets our backend."""
    register_scheduled(Ledger(), make_tuner(None, "", measures=False) if mode == "chosen" else None)

    def ours(call: Callable[..., Any], *args: Any, backend: Any = None, **options: Any) -> Any:
        return call(*args, backend=NAME if backend in ("gloo", "GLOO") else backend, **options)

    for module in (dist, c10d):
        module.init_process_group = partial(ours, c10d.init_process_group)  # type: ignore[attr-defined]
        module.new_group = partial(ours, c10d.new_group)  # type: ignore[attr-defined]
        module.get_backend = lambda group=None: "gloo"  # type: ignore[attr-defined]
    look = suite.get_profiling_event

    def events(name: str, profiler: Any, *args: Any, **options: Any) -> list[Any]:
        found = look(name, profiler, *args, **options)
        return found or look(name.replace("gloo:", f"{NAME}:"), profiler, *args, **options)

    suite.get_profiling_event = events


class Ranks(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
    """Every test of the suite, on ranks that are forked from this process."""

    mode = MODES[0]

    def setUp(self) -> None:
        super().setUp()
        if suite.INIT_METHOD.startswith("file://"):  # where the ranks of a test before, or of another mode, have met
            Path(suite.INIT_METHOD.removeprefix("file://")).unlink(missing_ok=True)
        self._start_processes(torch.multiprocessing.get_context("fork").Process)

    @classmethod
    def _run(cls, rank: int, test_name: str, file_name: str, pipe: Any, **options: Any) -> None:
        torch.set_num_threads(1)
        take_the_place_of_gloo(cls.mode)
        super()._run(rank, test_name, file_name, pipe, **options)


class Counted(unittest.TextTestResult):
    """Names of what passed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.passed: list[str] = []

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed.append(test._testMethodName)


def run(mode: str, names: list[str]) -> bool:
    """Whether all went as expected."""
    kind = type(f"Ranks_{mode}", (Ranks,), {"mode": mode, "__module__": __name__})
    globals()[kind.__name__] = kind
    found = names or unittest.TestLoader().getTestCaseNames(kind)
    result = unittest.TextTestRunner(verbosity=2 if names else 1, resultclass=Counted, buffer=not names).run(
        unittest.TestSuite(map(kind, found))
    )
    failed = sorted({test._testMethodName for test, _ in (*result.failures, *result.errors)})
    print(f"{mode}: {len(result.passed)} passed, {len(failed)} failed, {len(result.skipped)} do not apply")  # type: ignore[attr-defined]
    for name in failed:
        print(f"  {name}: {EXPECTED.get(name, 'NOT EXPECTED')}")
    surprising = set(EXPECTED) & set(result.passed)  # type: ignore[attr-defined]
    for name in surprising:
        print(f"  {name} passes, and is listed as one that cannot")
    return not surprising and set(failed) <= set(EXPECTED)


def main(arguments: list[str]) -> int:
    """See the top of the file."""
    modes = [mode for mode in MODES if mode in arguments] or list(MODES)
    names = [argument for argument in arguments if argument not in MODES]
    logging.getLogger("torch.testing._internal.common_distributed").setLevel(logging.WARNING)
    return 0 if all([run(mode, names) for mode in modes]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
