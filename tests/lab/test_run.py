"""Commands on a real lab: who they are, what they see, how fast their links are, and what the cards counted."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from thinwire.bench.lab import SCRIPT, measure, transfer
from thinwire.cluster import Cluster, Quantity, load_cluster
from thinwire.errors import UserError
from thinwire.lab.commands import processes_for
from thinwire.lab.run import RESULTS, LabOptions, LabResult, launch, run
from thinwire.lab.wiring import imitated, wire
from thinwire.record import RunFolder

pytestmark = pytest.mark.lab


def shell(text: str) -> list[str]:
    return ["sh", "-c", text]


def test_a_host_has_its_own_name_addresses_memory_and_variables(build: Callable[..., Cluster]) -> None:
    cluster = build(devices=2)
    say = (
        f'echo "$(hostname) $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $NODE_RANK $MASTER_ADDR $MASTER_PORT '
        f'$GLOO_SOCKET_IFNAME" > {RESULTS}/$RANK; cat $THINWIRE_LAB > {RESULTS}/lab$RANK; echo > /dev/shm/$RANK; sleep 0.3; '
        f"ls /dev/shm > {RESULTS}/shm$RANK; getent hosts host1 > {RESULTS}/hosts$RANK"
    )
    result = launch(cluster, processes_for(cluster, shell(say)))
    assert result.failure is None and result.exit_codes == {"host0": 0, "host1": 0}
    for rank in range(4):
        host = rank // 2
        assert result.results[str(rank)] == f"host{host} {rank} 4 {rank % 2} 2 {host} host0 29500 eth0\n"
        assert result.results[f"shm{rank}"].split() == [str(2 * host), str(2 * host + 1)]
        assert result.results[f"hosts{rank}"].split() == ["10.77.0.2", "host1"]
        lab = json.loads(result.results[f"lab{rank}"])
        assert lab | {"host": "", "cluster": ""} == {
            "cluster": "", "host": "", "paced": False, "delay": "none", "results": RESULTS,
        }  # fmt: skip
        assert lab["host"] == f"host{host}"


def test_the_cluster_file_inside_is_the_cluster(build: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = build()
    result = run(cluster, {"host0": shell(f"cp {Path(RESULTS).parent}/cluster.toml {RESULTS}/cluster")})
    (tmp_path / "c.toml").write_text(result.results["cluster"])
    assert load_cluster(tmp_path / "c.toml") == imitated(cluster, result.delay)


def test_paced_is_asked_for_where_a_rate_is_declared(build: Callable[..., Cluster]) -> None:
    cluster = build()
    host = cluster.hosts[0]
    fast = replace(host, devices=(replace(host.devices[0], flops_per_s=Quantity(1e9)),))
    cluster = replace(cluster, hosts=(fast, *cluster.hosts[1:]))
    for paced in (True, False):
        commands = {name: shell(f"cat $THINWIRE_LAB > {RESULTS}/{name}") for name in ("host0", "host1")}
        result = run(cluster, commands, LabOptions(paced=paced))
        assert json.loads(result.results["host0"])["paced"] is paced
        assert json.loads(result.results["host1"])["paced"] is False


@pytest.mark.parametrize(
    ("link_bps", "sizes"), [(1e6, [256 * 1024]), (10e6, [256 * 1024]), (100e6, [256 * 1024, 4 * 1024 * 1024])]
)
def test_a_message_is_not_faster_than_its_link(link_bps: float, sizes: list[int]) -> None:
    for row in measure(link_bps, sizes):
        assert row["faster_by"] <= (0.12 if row["bytes"] <= 256 * 1024 else 0.03), row


def test_cards_count_what_was_sent_and_tcp_is_cubic() -> None:
    size = 4 * 1024 * 1024
    result = transfer(400e6, [size])
    counts = {(card.host, card.interface): card for card in result.cards}
    assert size < counts["host0", "eth0"].sent_bytes < 1.08 * size
    assert size < counts["host1", "eth0"].received_bytes < 1.08 * size
    assert json.loads(result.results["socket_transfer.json"])["congestion"] == ["cubic", "cubic"]


def test_two_pairs_share_the_uplink_between_two_switches(build: Callable[..., Cluster]) -> None:
    cluster = build(("host0", "a"), ("host1", "a"), ("host2", "b"), ("host3", "b"), ("a", "b"))
    size = 8 * 1024 * 1024  # 0.7 s alone, so that they meet though one may begin some tenths of a second after the other
    bound = 2 * size * 8 * 1.0466 / 100e6
    script = [sys.executable, "-S", str(SCRIPT)]
    send = {f"host{i}": [*script, "send", f"host{i + 2}", f"{RESULTS}/{i}", str(size)] for i in (0, 1)}
    result = run(cluster, send | {f"host{i}": [*script, "receive"] for i in (2, 3)})
    assert result.failure is None
    slowest = max(json.loads(result.results[str(i)])["seconds"][0] for i in (0, 1))
    assert slowest > 0.7 * bound


def test_cards_json_is_written_into_the_run_folder(build: Callable[..., Cluster], tmp_path: Path) -> None:
    call = {"label": "gradients", "axis": "data", "op": "all_reduce", "calls": 1, "message_bytes": 5}
    entries = [{**call, "rank": rank, "wire_bytes": 10 * (rank + 1)} for rank in (0, 1, 1)]
    RunFolder(tmp_path).write("ledger.json", {"entries": entries})
    result = run(build(), {"host0": shell(f"echo {tmp_path} > {RESULTS}/run_folder")})
    content = json.loads((tmp_path / "cards.json").read_text())
    assert result.run_folder == tmp_path
    assert content["ledger_sent_bytes"] == {"host0": 10, "host1": 40}
    assert [(card["host"], card["interface"]) for card in content["cards"]] == [("host0", "eth0"), ("host1", "eth0")]


def test_shares_are_of_the_rate_of_their_own_direction(build: Callable[..., Cluster]) -> None:
    cluster = build()
    out, *others = cluster.links
    cluster = replace(cluster, links=(replace(out, bandwidth_bps=Quantity(50e6)), *others))
    answer = {"processes": [], "failures": [], "signal": None, "seconds": 2.0, "results": {}, "retransmitted": {}}
    answer["counters"] = {"host0": {"eth0": [1_000_000, 3_000_000]}, "host1": {"eth0": [0, 0]}}
    card, _ = LabResult(wire(cluster, netem=False), answer).cards
    assert (card.host, card.sent_share, card.received_share) == ("host0", 8e6 / (50e6 * 2), 24e6 / (100e6 * 2))


def test_a_failure_names_host_code_and_last_words_and_ends_the_others(build: Callable[..., Cluster]) -> None:
    commands = {"host0": shell("sleep 60"), "host1": shell("echo one >&2; echo two >&2; exit 9")}
    started = time.monotonic()
    result = run(build(), commands, LabOptions(notice_s=0.2))
    assert time.monotonic() - started < 30
    assert (result.failure, result.exit_code) == ("host1: exit code 9: two", 9)
    assert result.exit_codes == {"host0": -15, "host1": 9}


def test_a_mistake_of_the_user_is_named_rather_than_its_echo_and_printed_once(build: Callable[..., Cluster]) -> None:
    commands = {"host0": shell("echo thinwire: error: port 1 is taken >&2; sleep 0.3; exit 2"), "host1": shell("exit 1")}
    result = run(build(), commands)
    assert (result.failure, result.exit_code) == ("host0: exit code 2: port 1 is taken", 2)


def test_a_command_that_does_not_exist(build: Callable[..., Cluster]) -> None:
    result = run(build(), {"host1": ["/no/such/program"]})
    assert result.failure and result.failure.startswith("host1: exit code 127: ") and "/no/such/program" in result.failure


def test_an_unknown_host_is_refused(build: Callable[..., Cluster]) -> None:
    with pytest.raises(UserError, match="no host 'host7'; known: host0, host1"):
        run(build(), {"host7": ["true"]})


def test_train_becomes_one_agent_a_host(build: Callable[..., Cluster]) -> None:
    first, second = processes_for(build(devices=2), ["/usr/bin/thinwire", "train", "run.toml", "--set", "a.b=c"])
    agent = (sys.executable, "-m", "thinwire.train.agent", "--nnodes", "2", "--node-rank")
    rest = ("--nproc-per-node", "2", "--rdzv-endpoint", "host0:29500", "--", "run.toml", "--set", "a.b=c")
    assert first.argv == (*agent, "0", *rest) and second.argv == (*agent, "1", *rest)
    mixed = replace(build(devices=2), ranks=("host0/cpu0", "host1/cpu0", "host0/cpu1", "host1/cpu1"))
    with pytest.raises(UserError, match="one after another"):
        processes_for(mixed, ["thinwire", "train"])


def test_the_command_line(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "from thinwire.cli.lab import app; app()", "run", "--cluster", "four-hosts-100mbit"]
    argv += ["--json", str(tmp_path / "cards.json"), "--", "sh", "-c", "echo on $(hostname); exit 3"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 3
    assert "on host0\n" in done.stdout and "host3 eth0" in done.stdout
    assert done.stderr.startswith("thinwire: error: host") and done.stderr.count("\n") == 1
    assert len(json.loads((tmp_path / "cards.json").read_text())["cards"]) == 4
