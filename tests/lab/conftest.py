"""What the tests of the lab share: small clusters, and a supervisor that can be killed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from small_cluster import build_cluster

from thinwire.cluster import Cluster, dump_cluster
from warm import warm_labs

SUPERVISOR = """
import sys
from pathlib import Path
from thinwire.cluster import load_cluster
from thinwire.lab.run import LabOptions, run
host0, host1 = sys.argv[3:5]
options = LabOptions(grace_s=float(sys.argv[2]), notice_s=0.5)
result = run(load_cluster(sys.argv[1]), {"host0": ["sh", "-c", host0], "host1": ["sh", "-c", host1]}, options)
print(result.failure, result.signal)
sys.exit(result.exit_code)
"""


@pytest.fixture
def build() -> Callable[..., Cluster]:
    return build_cluster


@pytest.fixture
def warm() -> Iterator[None]:
    with warm_labs():
        yield


@pytest.fixture(scope="session")
def under_way(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Callable[[Path], Any], Future[Any]]]:
    """Labs that mostly wait, all started at once: what the modules of the chosen tests name in AT_ONCE, each with a folder."""
    modules = {item.module for item in request.session.items if hasattr(getattr(item, "module", None), "AT_ONCE")}
    functions = [function for module in sorted(modules, key=lambda module: module.__name__) for function in module.AT_ONCE]
    with ThreadPoolExecutor(len(functions)) as pool:
        with warm_labs():
            started = {function: pool.submit(function, tmp_path_factory.mktemp(function.__name__)) for function in functions}
            wait(started.values())
        yield started


class Supervisor:
    """A lab in a process of its own. All its processes carry a mark in their environment, so that they can be found."""

    def __init__(self, cluster: Path, host0: str, host1: str, *, grace_s: float = 1.0, before: list[str]) -> None:
        self.mark = f"THINWIRE_TEST_MARK={uuid4().hex}"
        name, value = self.mark.split("=")
        argv = [*before, sys.executable, "-c", SUPERVISOR, str(cluster), str(grace_s), host0, host1]
        self.process = subprocess.Popen(
            ["env", f"{name}={value}", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def processes(self) -> dict[int, str]:
        """pid -> command line of everything that carries the mark and is not a zombie."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def networks(self) -> set[str]:
        """The network namespaces of the marked processes, without the one that the tests run in."""
        found = set()
        for pid in self.processes():
            try:
                found.add(str(Path(f"/proc/{pid}/ns/net").readlink()))
            except OSError:
                continue
        return found - {str(Path("/proc/self/ns/net").readlink())}


@pytest.fixture
def supervise(tmp_path: Path, build: Callable[..., Cluster]) -> Iterator[Callable[..., Supervisor]]:
    path = tmp_path / "cluster.toml"
    dump_cluster(build(), path)
    path.chmod(0o644)
    started: list[Supervisor] = []

    def start(host0: str, host1: str, *, grace_s: float = 1.0, before: tuple[str, ...] = ()) -> Supervisor:
        started.append(Supervisor(path, host0, host1, grace_s=grace_s, before=list(before)))
        return started[-1]

    yield start
    for supervisor in started:
        supervisor.process.kill()
        supervisor.process.communicate(timeout=10)
