"""The command as a user meets it: in the lab, on this machine's ranks, and where something is wrong."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch, load_cluster
from thinwire.lab.commands import processes_for
from thinwire.lab.kernel import examine
from thinwire.lab.run import RESULTS, launch

PROBE = (sys.executable, "-m", "thinwire", "probe")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@pytest.fixture
def port() -> int:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return int(line.getsockname()[1])


def start(rank: int, world_size: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    variables = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    return subprocess.Popen(
        [*PROBE, *arguments], env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=40)
    finally:
        process.kill()
    return process.returncode, out, err


def test_started_alone_it_says_how_to_start_it(tmp_path: Path) -> None:
    done = subprocess.run([*PROBE, "-o", str(tmp_path / "c.toml")], capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("thinwire: error: a probe measures between ranks")
    assert "torchrun" in done.stderr and "thinwire lab run" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ranks_of_one_machine_are_one_host(tmp_path: Path, port: int) -> None:
    path = tmp_path / "c.toml"
    (code, out, err), (other, _, _) = [end(process) for process in [start(rank, 2, port, "-o", str(path)) for rank in (0, 1)]]
    assert (code, other) == (0, 0), err
    assert "there are no links to measure" in out
    cluster = load_cluster(path)
    assert [len(host.devices) for host in cluster.hosts] == [2]
    assert cluster.world_size == 2 and not cluster.links
    assert cluster.devices[0].flops_per_s is not None and cluster.devices[0].flops_per_s.source == "measured"


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path, port: int) -> None:
    path = tmp_path / "missing" / "c.toml"
    (code, out, err), (other, _, echo) = [end(process) for process in [start(rank, 2, port, "-o", str(path)) for rank in (0, 1)]]
    assert (code, other) == (2, 2)
    assert err.strip() == f"thinwire: error: {path} cannot be written: No such file or directory; give another file with -o"
    assert (out, echo) == ("", "")


def test_a_rank_that_vanishes_ends_the_others_in_one_line(tmp_path: Path, port: int) -> None:
    first, second = (start(rank, 2, port, "-o", str(tmp_path / "c.toml")) for rank in (0, 1))
    assert first.stdout is not None
    assert "1 host, 2 ranks" in first.stdout.readline()
    second.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    code, _, err = end(first)
    end(second)
    assert code == 1
    assert time.monotonic() - begun < 20
    assert err.strip().splitlines()[-1].startswith("thinwire: error: rank 0 lost the connection to another rank")
    assert not (tmp_path / "c.toml").exists()


@pytest.mark.lab
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
    result = launch(cluster, processes_for(cluster, [*PROBE, "-o", f"{RESULTS}/found.toml"]))
    assert result.failure is None
    path = tmp_path / "found.toml"
    path.write_text(result.results["found.toml"], encoding="utf-8")
    found = load_cluster(path)
    assert found.ranks == ("host0/cpu0", "host1/cpu0")
    # Between two hosts only the slower card of each direction can be seen.
    for source, target, limit in (("host0", "host1", 10e6), ("host1", "host0", 20e6)):
        links = {(link.source, link.target): link.bandwidth_bps.value for link in found.links}
        assert min(links[source, "switch"], links["switch", target]) == pytest.approx(limit, rel=0.1)
