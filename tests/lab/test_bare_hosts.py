"""Hosts as Debian leaves them: own names that are 127.0.1.1, a bridge that leads nowhere, no variable that names a card."""

import sys
from pathlib import Path

import pytest

from thinwire.cluster import load_cluster
from thinwire.lab.commands import processes_for
from thinwire.lab.run import RESULTS, LabOptions, LabResult, launch

pytestmark = pytest.mark.lab

SCRIPT = """
import os, sys
import torch, torch.distributed as dist
import thinwire

def sums(group):
    one = torch.ones(1)
    dist.all_reduce(one, group=group)
    return int(one)

thinwire.init(collectives="native")
rank = dist.get_rank()
halves, odd = [dist.new_group([0, 1]), dist.new_group([2, 3])], dist.new_group([1, 3])
found = [sums(None), sums(halves[rank // 2]), *([sums(odd)] if rank % 2 else [])]
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with thinwire.DiLoCo(model, optimizer, every=2):
    for _ in range(4):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    print(*found, os.environ.get("GLOO_SOCKET_IFNAME"), open("/etc/hosts").read().count("\\n127.0.1.1 host"), file=file)
dist.destroy_process_group()
"""


def on_bare_hosts(*argv: str) -> LabResult:
    cluster = load_cluster("four-hosts-100mbit")
    return launch(cluster, processes_for(cluster, argv), LabOptions(bare=True, paced=False))


@pytest.mark.long
def test_groups_and_diloco_of_a_plain_script_find_the_card(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = on_bare_hosts(sys.executable, str(script), RESULTS)
    assert result.failure is None
    for rank in range(4):
        own = "4 2 2" if rank % 2 else "4 2"
        assert result.results[str(rank)] == f"{own} None 1\n"
    assert all(card.sent_bytes > 500 for card in result.cards)


@pytest.mark.long
def test_training_finds_the_card(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(
        '[model]\npreset = "1m"\n[train]\nranks = 4\nsteps = 2\nmicro_batch = 1\nsequence = 16\neval_tokens = 64\n'
        f'run = "{tmp_path}/run"\n'
    )
    result = on_bare_hosts("thinwire", "train", str(run))
    assert result.failure is None
    assert all(card.sent_bytes > 1e6 for card in result.cards)


@pytest.mark.long
@pytest.mark.timeout(180)
def test_the_probe_finds_the_card(tmp_path: Path) -> None:
    cluster = load_cluster("four-hosts-100mbit")
    written = tmp_path / "disks" / "host0" / "found.toml"
    argv = (sys.executable, "-m", "thinwire", "probe", "-o", str(tmp_path / "disks" / "found.toml"))
    result = launch(cluster, processes_for(cluster, argv), LabOptions(bare=True, paced=False, disks=tmp_path / "disks"))
    assert result.failure is None
    found = load_cluster(written)
    assert [link.bandwidth_bps.value for link in found.links] == pytest.approx([100e6] * len(found.links), rel=0.1)
