"""A choice of collectives belongs to the network that it was measured on."""

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fixed_schedules import Fixed, group_of, quick
from pool import Pool, Rank
from thinwire.cluster import Cluster, dump_cluster, load_cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.cluster.model import Quantity
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.tuned import tuner as tuner_module
from thinwire.collectives.tuned.advice import Advisor
from thinwire.collectives.tuned.cache import FORMAT, MOST_NETWORKS, Cache, network_of
from thinwire.collectives.tuned.tuner import Tuner
from thinwire.errors import UserError
from thinwire.lab.run import LabOptions, run
from warm import warm_labs

NAMES = ["two-racks", "eight-hosts-100mbit", "four-hosts-100mbit", "one-slow-host"]


known = cache(load_cluster)


def whole(cluster: Cluster, hosts: str = "here") -> Any:
    return network_of(cluster, range(cluster.world_size), [hosts] * cluster.world_size)


def changed(cluster: Cluster, index: int, **quantities: float) -> Cluster:
    link = replace(cluster.links[index], **{name: Quantity(value) for name, value in quantities.items()})
    return replace(cluster, links=(*cluster.links[:index], link, *cluster.links[index + 1 :]))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_says_the_same_is_the_same_network(tmp_path: Path, name: str) -> None:
    """Written without shorthands, by another name, with its links in another order, and with dates of measurement."""
    cluster = load_cluster(name)
    dump_cluster(cluster, tmp_path / "again.toml")
    again = load_cluster(tmp_path / "again.toml")
    dated = [
        replace(link, bandwidth_bps=replace(link.bandwidth_bps, source="measured", date="2026-11-28")) for link in again.links
    ]
    other = replace(again, name="other", links=tuple(reversed(dated)))
    assert whole(cluster) == whole(other) and whole(cluster).key == whole(other).key


@given(st.sampled_from(NAMES), st.integers(0, 7), st.floats(0.05, 20))
def test_a_link_of_another_rate_is_another_network_and_noise_is_not(name: str, index: int, factor: float) -> None:
    cluster = known(name)
    rate = cluster.links[index].bandwidth_bps.value
    other = whole(changed(cluster, index, bandwidth_bps=rate * factor))
    assert whole(cluster).near(other) == other.near(whole(cluster)) == (1 / 1.2 <= factor <= 1.2)


@given(st.sampled_from(NAMES), st.integers(0, 7), st.floats(0, 0.01))
def test_latencies_may_differ_by_more(name: str, index: int, latency_s: float) -> None:
    cluster = known(name)
    before = cluster.links[index].latency_s.value
    near = abs(before - latency_s) <= 50e-6 or max(before, latency_s) <= 2 * min(before, latency_s)
    assert whole(cluster).near(whole(changed(cluster, index, latency_s=latency_s))) == near


def test_other_hosts_places_and_switches_are_another_network() -> None:
    racks, hosts = load_cluster("two-racks"), load_cluster("eight-hosts-100mbit")
    assert not whole(racks).near(whole(hosts))
    assert not whole(racks).near(whole(racks, "there"))
    ranks = [*reversed(range(racks.world_size))]
    assert not whole(racks).near(network_of(racks, ranks, ["here"] * len(ranks)))
    assert not network_of(None, range(2), ["a", "b"]).near(network_of(None, range(2), ["b", "a"]))
    assert network_of(None, range(2), ["a", "b"]).near(network_of(None, range(2), ["a", "b"]))


@given(st.lists(st.floats(0.9, 1.12), min_size=2, max_size=30))
def test_small_changes_do_not_add_up(drifts: list[float]) -> None:
    """However it is probed again and again: what holds is always near what was measured."""
    cluster, kept = known("four-hosts-100mbit"), Cache(None)
    first = rate = cluster.links[0].bandwidth_bps.value
    kept.store("call", whole(cluster), {"way": "w", "seconds": 1.0, "native_s": 2.0})
    for drift in drifts:
        rate *= drift
        found = kept.find("call", whole(changed(cluster, 0, bandwidth_bps=rate)))
        assert (found is not None) == (max(rate, first) <= 1.2 * min(rate, first))


def test_a_cache_keeps_what_was_measured_on_either_network(tmp_path: Path) -> None:
    path = tmp_path / "cluster.collectives.json"
    racks, hosts = whole(load_cluster("two-racks")), whole(load_cluster("eight-hosts-100mbit"))
    Cache(path).store("call", racks, {"way": "of racks", "seconds": 1.0, "native_s": 2.0})
    cache = Cache(path)
    assert cache.find("call", hosts) is None and cache.elsewhere("call")
    cache.store("call", hosts, {"way": "of hosts", "seconds": 1.0, "native_s": 2.0})
    again = Cache(path)
    assert [again.find("call", one)["way"] for one in (racks, hosts)] == ["of racks", "of hosts"]  # type: ignore[index]
    again.store("call", hosts, {"way": "new", "seconds": 1.0, "native_s": 2.0})
    assert len(json.loads(path.read_text())["networks"]) == 2
    path.write_text(path.read_text().replace('"networks"', '"netwerk"'))
    assert not Cache(path).elsewhere("call")  # started anew


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"thinwire_collectives": FORMAT - 1}, f"has format {FORMAT - 1}, and this thinwire writes {FORMAT}"),
        ({"thinwire_collectives": FORMAT, "torch": "1.0"}, f"is of torch 1.0, and this is {torch.__version__}"),
        ({"thinwire_collectives": FORMAT, "torch": torch.__version__, "networks": {}, "entries": {"call": 1}}, "cannot be read"),
        ([], "cannot be read"),
    ],
)
def test_a_file_that_is_begun_anew_says_why(tmp_path: Path, content: Any, why: str) -> None:
    path = tmp_path / "cluster.collectives.json"
    path.write_text(json.dumps(content))
    assert Cache(path).dropped.startswith(why)
    Cache(path).store("call", whole(load_cluster(NAMES[0])), {"way": "w", "bytes": 4, "seconds": 1.0, "native_s": 2.0})
    assert Cache(path).dropped == "" and Cache(path).elsewhere("call")


def test_a_cache_does_not_grow_with_every_name_of_a_host(tmp_path: Path) -> None:
    path = tmp_path / "cluster.collectives.json"
    networks = [network_of(None, [0], [f"pod-{number}"]) for number in range(3 * MOST_NETWORKS)]
    for one in networks:
        Cache(path).store("call", one, {"way": "w", "bytes": 4, "seconds": 1.0, "native_s": 2.0})
    held = [Cache(path).find("call", one) is not None for one in networks]
    assert held == [False] * 2 * MOST_NETWORKS + [True] * MOST_NETWORKS
    assert len(json.loads(path.read_text())["networks"]) == MOST_NETWORKS


def runs(context: Rank, folder: str, clusters: list[str], stale: float) -> list[tuple[list[str], str]]:
    """One run after another with one cache: (what was reported, what was chosen)."""
    found = []
    with quick(stale):
        for name in clusters:
            lines: list[str] = []
            advisor = Fixed()
            advisor.cluster = load_cluster(name) if name else None
            tuner = Tuner(advisor, Cache(Path(folder) / "cluster.collectives.json"), report=lines.append)
            dist.all_reduce(torch.zeros(3000), group=group_of(Ledger(), tuner))
            found.append((lines, next(iter(tuner.chosen.values())).name))
            dist.barrier()
    return found


@pytest.mark.timeout(120)
def test_a_choice_is_not_used_on_another_network_and_is_found_again(ranks2: Pool, tmp_path: Path) -> None:
    names = ["four-hosts-100mbit", "two-racks", "four-hosts-100mbit", "two-racks", ""]
    found = ranks2.run(runs, str(tmp_path), names, float("inf"), timeout_s=100)
    reported = [lines for lines, _ in found[0]]
    assert [len(lines) for lines in reported] == [1, 2, 0, 0, 2]
    assert all("was measured on another network; measuring" in lines[0] for lines in (reported[1], reported[4]))
    assert all([name for _, name in one] == [name for _, name in found[0]] for one in found)
    assert all(not lines for one in found[1:] for lines, _ in one)


def test_a_choice_that_takes_half_as_long_again_is_measured_again(ranks2: Pool, tmp_path: Path) -> None:
    ranks2.run(runs, str(tmp_path), ["two-racks"], float("inf"))
    path = tmp_path / "cluster.collectives.json"
    for factor in (1e-3, 1e3):  # as if it had been so much faster, or slower
        stored = json.loads(path.read_text())
        for entries in stored["entries"].values():
            for entry in entries.values():
                entry["seconds"] *= factor
        path.write_text(json.dumps(stored))
        ((lines, _),) = ranks2.run(runs, str(tmp_path), ["two-racks"], 1.5)[0]
        assert len(lines) == 2 and "when it was measured; measuring again" in lines[0]
        after = json.loads(path.read_text())
        kept = [entry["seconds"] for entries in after["entries"].values() for entry in entries.values()]
        assert 1e-6 < kept[0] < 10
    ((lines, _),) = ranks2.run(runs, str(tmp_path), ["two-racks"], float("inf"))[0]
    assert lines == []


def timed(context: Rank, folder: str) -> tuple[list[tuple[int, int]], list[str]]:
    """Sizes of one class in a first run, then in two groups of a second one.

    (implementations, bytes) of each measurement; what was reported.
    """
    measured, lines, real = list[tuple[int, int]](), list[str](), tuner_module.measure

    def noted(engine: Any, implementations: list[Any], call: Any) -> list[float]:
        measured.append((len(implementations), call.message_bytes))
        return real(engine, implementations, call)

    with quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner_module, "measure", noted)
        for sizes in ([1100], [2000, 1500]):
            tuner = Tuner(Fixed(), Cache(Path(folder) / "cluster.collectives.json"), report=lines.append)
            for n in sizes:
                dist.all_reduce(torch.zeros(n), group=group_of(Ledger(), tuner))
            dist.barrier()
    return measured, lines


def test_a_choice_is_timed_once_in_a_run_on_the_size_that_it_was_measured_on(ranks2: Pool, tmp_path: Path) -> None:
    found = ranks2.run(timed, str(tmp_path))
    assert [measured for measured, _ in found] == [[(2, 4400), (1, 4400)]] * 2
    assert len(found[0][1]) == 1


def by_price(context: Rank, folder: str) -> list[str]:
    runs(context, folder, ["four-hosts-100mbit"], float("inf"))
    lines: list[str] = []
    advisor = Fixed()
    advisor.cluster = load_cluster("two-racks")
    tuner = Tuner(advisor, Cache(Path(folder) / "cluster.collectives.json"), measures=False, report=lines.append)
    dist.all_reduce(torch.zeros(3000), group=group_of(Ledger(), tuner))
    return lines


def test_what_is_not_measured_is_not_said_to_be(ranks2: Pool, tmp_path: Path) -> None:
    (line,) = ranks2.run(by_price, str(tmp_path))[0]
    assert line.endswith("was measured on another network; taking the best by price")


def of_a_small_file(context: Rank, folder: str) -> str:
    cache = Cache(Path(folder) / "cluster.collectives.json")
    tuner = Tuner(Advisor(equal_hosts(1, 100e6)), cache, report=lambda line: None)
    with quick(), pytest.raises(UserError) as refused:
        dist.all_reduce(torch.zeros(3000), group=group_of(Ledger(), tuner, timeout_s=20))
    return str(refused.value)


def test_ranks_that_the_file_lacks_are_refused_on_all_ranks(ranks2: Pool, tmp_path: Path) -> None:
    wanted = "1-hosts has 1 ranks, but rank 1 runs; give the cluster file of these ranks"
    assert ranks2.run(of_a_small_file, str(tmp_path)) == [wanted] * 2


IN_THE_LAB = """
import os, sys, torch, torch.distributed as dist, thinwire
rank, cluster = int(sys.argv[1]), sys.argv[2]
os.environ["GLOO_SOCKET_IFNAME"] = sys.argv[4]
thinwire.init(cluster, init_method="tcp://" + sys.argv[3] + ":29533", rank=rank, world_size=4)
dist.all_reduce(torch.zeros(2**15))
dist.barrier()
"""


def racks(rate: str, tmp_path: Path) -> Path:
    """Four hosts in two racks, ranks in turns, and the link between the racks of this rate; always the same file name."""
    host = '[[host]]\nname = "{}"\nrack = "{}"\ncard = {{ bandwidth_bps = "100 Mbit/s" }}\n'
    rack = '[[rack]]\nname = "{}"\nuplink = {{ bandwidth_bps = "{}" }}\n'
    hosts = "".join(host.format(f"host{number}", f"rack{number % 2}") for number in range(4))
    path = tmp_path / "cluster.toml"
    path.write_text('name = "small"\n' + hosts + "".join(rack.format(f"rack{number}", rate) for number in range(2)))
    return path


@pytest.mark.long
@pytest.mark.lab
@pytest.mark.timeout(240)  # eight processes load torch
def test_in_the_lab_a_file_that_was_written_anew_is_measured_anew(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "call.py").write_text(IN_THE_LAB)
    said = []
    for rate in ("25 Mbit/s", "100 Mbit/s"):
        path = racks(rate, tmp_path)
        cluster = load_cluster(path)
        with warm_labs():
            call = [sys.executable, str(tmp_path / "call.py")]
            commands = {f"host{rank}": [*call, str(rank), str(path), "host0", "eth0"] for rank in range(4)}
            result = run(cluster, commands, LabOptions())
        assert result.exit_code == 0
        said.append([line for line in capfd.readouterr().err.splitlines() if "all_reduce of" in line])
    assert [len(lines) for lines in said] == [1, 2] and "another network" in said[1][0]
