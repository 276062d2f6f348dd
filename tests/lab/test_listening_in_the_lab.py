"""What listens on the hosts of a lab: the one card that leads to the others, whatever other cards there are and however a host
knows itself."""

import json
import sys
from pathlib import Path

import pytest
from small_cluster import build_cluster

from thinwire.cluster import Cluster
from thinwire.lab.commands import Process, processes_for
from thinwire.lab.run import RESULTS, LabOptions, LabResult, launch

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

CABLES = ("host0", "switch"), ("host1", "switch"), ("host0", "nothing"), ("host1", "nowhere")
"""Two cards a host, of which the second leads nowhere."""
TESTS = Path(__file__).parents[1]
WATCH = f"""
import json, socket, sys, time
sys.path.insert(0, {str(TESTS)!r})
import listeners
from pathlib import Path

seen, host, end = [], sys.argv[1], Path("{RESULTS}/over")
Path("{RESULTS}", "watching-" + host).touch()
while not end.exists():
    now = sorted(set(listeners.of_network().values()))
    if now and [now] != seen[-1:]:
        seen.append(now)
    time.sleep(0.01)
Path("{RESULTS}", "listened-" + host).write_text(json.dumps(seen))
"""
INIT = """
import torch, torch.distributed as dist
import thinwire
thinwire.init(collectives="native")
dist.all_reduce(torch.ones(1))
dist.barrier()
dist.destroy_process_group()
"""


def listened(
    cluster: Cluster, argv: tuple[str, ...], folder: Path, *, bare: bool = True
) -> tuple[LabResult, dict[str, list[list[str]]]]:
    """Run a command as `thinwire lab run` does; by host the sets of addresses at which anybody listened meanwhile, in order.

    The first rank begins, and so the others get to know each other, when all hosts are watched.
    """
    watch = folder / "watch.py"
    watch.write_text(WATCH)
    first, *others = processes_for(cluster, argv)
    watched = "".join(f"until [ -e {RESULTS}/watching-{host.name} ]; do sleep 0.01; done; " for host in cluster.hosts)
    over = Process(
        first.host, ("sh", "-c", f'{watched}"$@"; code=$?; touch {RESULTS}/over; exit $code', "sh", *first.argv), first.variables
    )
    watchers = [Process(host.name, (sys.executable, str(watch), host.name)) for host in cluster.hosts]
    result = launch(cluster, [over, *others, *watchers], LabOptions(bare=bare, paced=False))
    return result, {host.name: json.loads(result.results.get(f"listened-{host.name}", "[]")) for host in cluster.hosts}


def eth0(cluster: Cluster, host: str) -> str:
    """As the lab numbers them."""
    from thinwire.lab.wiring import wire

    return next(card.address for card in wire(cluster, netem=False).cards if (card.host, card.interface) == (host, "eth0"))


def check(cluster: Cluster, argv: tuple[str, ...], folder: Path, *, bare: bool = True) -> None:
    """Only the card that leads to the others; where a host's name is loopback there and it has more cards, these too, between
    the store and the first call."""
    result, seen = listened(cluster, argv, folder, bare=bare)
    assert result.failure is None
    card = {host.name: eth0(cluster, host.name) for host in cluster.hosts}
    assert set(map(tuple, seen["host1"])) == {(card["host1"],)}
    *before, last = seen["host0"]
    assert last == [card["host0"]] and len(before) <= 2 and (len(before) < 2 or before[0] == last)
    for addresses in before:
        assert {card["host0"]} <= set(addresses) <= ({card["host0"], "172.17.0.1", "10.77.1.1"} if bare else {card["host0"]})


def test_a_plain_script_listens_at_the_card(tmp_path: Path, warm: None) -> None:
    script = tmp_path / "script.py"
    script.write_text(INIT)
    check(build_cluster(("host0", "switch"), ("host1", "switch")), (sys.executable, str(script)), tmp_path)


TRAIN = """
[model]
preset = "1m"
[train]
ranks = 2
steps = 2
micro_batch = 1
sequence = 16
eval_tokens = 64
"""


@pytest.mark.long
@pytest.mark.parametrize("cables", [CABLES[:2], CABLES], ids=["one card", "two cards"])
@pytest.mark.parametrize("bare", [True, False])
def test_training_listens_at_the_card_that_leads_to_the_others(
    tmp_path: Path, warm: None, bare: bool, cables: tuple[tuple[str, str], ...]
) -> None:
    run = tmp_path / "run.toml"
    run.write_text(f'{TRAIN}run = "{tmp_path}/run"\n')
    check(build_cluster(*cables), ("thinwire", "train", str(run)), tmp_path, bare=bare)


@pytest.mark.long
def test_a_probe_listens_at_the_card_that_leads_to_the_others(tmp_path: Path, warm: None) -> None:
    check(build_cluster(*CABLES), (sys.executable, "-m", "thinwire", "probe", "-o", str(tmp_path / "found.toml")), tmp_path)


@pytest.mark.long
def test_bind_names_all_addresses(tmp_path: Path, warm: None) -> None:
    cluster, script = build_cluster(*CABLES[:2]), tmp_path / "script.py"
    script.write_text(INIT.replace('"native"', '"native", bind="0.0.0.0"'))
    result, seen = listened(cluster, (sys.executable, str(script)), tmp_path)
    assert result.failure is None
    assert {address for now in seen["host0"] for address in now} == {"0.0.0.0", eth0(cluster, "host0")}  # the store's and gloo's
