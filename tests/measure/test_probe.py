"""The command as a user meets it: in the lab, on this machine's ranks, and where something is wrong."""

import signal
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from command import started, thinwire
from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch, load_cluster
from thinwire.lab.commands import processes_for
from thinwire.lab.kernel import examine
from thinwire.lab.run import RESULTS, launch
from warm import warm_labs

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@pytest.fixture
def port() -> int:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return int(line.getsockname()[1])


def rank_of_two(rank: int, folder: Path, port: int, output: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    """`thinwire probe -o OUTPUT` as one of two ranks on this machine."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
    variables = {name: str(value) for name, value in place.items()}
    variables |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    return started("probe", "-o", str(output), cwd=folder, **variables)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=40)
    return process.returncode, out, err


def both(folder: Path, port: int, output: Path) -> tuple[tuple[int, str, str], tuple[int, str, str]]:
    with rank_of_two(0, folder, port, output) as first, rank_of_two(1, folder, port, output) as second:
        return end(first), end(second)


def test_started_alone_it_says_how_to_start_it(tmp_path: Path) -> None:
    done = thinwire("probe", "-o", "c.toml", cwd=tmp_path, cold=True)
    assert done.returncode == 2
    assert done.stderr.startswith("thinwire: error: a probe measures between ranks")
    assert "torchrun" in done.stderr and "thinwire lab run" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.long
def test_ranks_of_one_machine_are_one_host(tmp_path: Path, port: int) -> None:
    path = tmp_path / "c.toml"
    (code, out, err), (other, _, _) = both(tmp_path, port, path)
    assert (code, other) == (0, 0), err
    assert "there are no links to measure" in out
    cluster = load_cluster(path)
    assert [len(host.devices) for host in cluster.hosts] == [2]
    assert cluster.world_size == 2 and not cluster.links
    assert cluster.devices[0].flops_per_s is not None and cluster.devices[0].flops_per_s.source == "measured"


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path, port: int) -> None:
    path = tmp_path / "missing" / "c.toml"
    (code, out, err), (other, _, echo) = both(tmp_path, port, path)
    assert (code, other) == (2, 2)
    assert err.strip() == f"thinwire: error: {path} cannot be written: No such file or directory; give another file with -o"
    assert (out, echo) == ("", "")


@pytest.mark.long
def test_a_rank_that_vanishes_ends_the_others_in_one_line(tmp_path: Path, port: int) -> None:
    path = tmp_path / "c.toml"
    with rank_of_two(0, tmp_path, port, path) as first, rank_of_two(1, tmp_path, port, path) as second:
        assert first.stdout is not None
        assert "1 host, 2 ranks" in first.stdout.readline()
        second.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        code, _, err = end(first)
        killed, _, _ = end(second)
    assert (code, killed) == (1, -signal.SIGKILL)
    assert time.monotonic() - begun < 20
    assert err.strip().splitlines()[-1].startswith("thinwire: error: rank 0 lost the connection to another rank")
    assert not path.exists()


@pytest.mark.lab
@pytest.mark.long
def test_in_the_lab_it_recovers_the_links(tmp_path: Path) -> None:
    """Two cards, the second slower and slower still the other way."""
    if reason := examine().reason:
        pytest.fail(reason)
    rates = {("host0", "switch"): 40e6, ("switch", "host0"): 40e6, ("host1", "switch"): 20e6, ("switch", "host1"): 10e6}
    cluster = Cluster(
        name="uneven",
        hosts=tuple(Host(name=name, devices=(Device(name=f"{name}/cpu0"),)) for name in ("host0", "host1")),
        switches=(Switch(name="switch"),),
        links=tuple(
            Link(source=a, target=b, bandwidth_bps=Quantity(rate), latency_s=Quantity(0.0)) for (a, b), rate in rates.items()
        ),
    )
    with warm_labs():
        probe = [sys.executable, "-m", "thinwire", "probe", "-o", f"{RESULTS}/found.toml"]
        result = launch(cluster, processes_for(cluster, probe))
    assert result.failure is None
    path = tmp_path / "found.toml"
    path.write_text(result.results["found.toml"], encoding="utf-8")
    found = load_cluster(path)
    assert found.ranks == ("host0/cpu0", "host1/cpu0")
    # Between two hosts only the slower card of each direction can be seen.
    for source, target, limit in (("host0", "host1", 10e6), ("host1", "host0", 20e6)):
        links = {(link.source, link.target): link.bandwidth_bps.value for link in found.links}
        assert min(links[source, "switch"], links["switch", target]) == pytest.approx(limit, rel=0.15)
