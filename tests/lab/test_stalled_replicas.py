"""Replicas that live and die alone on hosts whose links fall silent: short silence changes nothing, long silence ends the one."""

import re
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from small_cluster import build_cluster

from thinwire.lab.commands import FIRST_CARD, Process
from thinwire.lab.run import RESULTS, LabOptions, LabResult, launch
from thinwire.lab.stalls import Stall

REPLICAS, STEPS, EVERY = 2, 48, 4
LOOP = f"""
import hashlib, sys, time
from pathlib import Path
import torch
import thinwire
torch.set_num_threads(1)
name, secret = sys.argv[1:]
torch.manual_seed(0)
model = torch.nn.Linear(16, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
with thinwire.AsyncDiLoCo(model, optimizer, store="host0:29700", name=name, secret_file=secret) as replica:
    for step in replica.remaining_steps():
        Path("{RESULTS}/begun").touch()
        torch.manual_seed(1000 * step + ord(name))
        inputs = torch.randn(8, 16)
        (model(inputs) - inputs[:, :1]).square().mean().backward()
        time.sleep(0.05)
        optimizer.step()
        optimizer.zero_grad()
weights = replica.client.weights.numpy().tobytes()
Path("{RESULTS}/" + name).write_text(hashlib.sha256(weights).hexdigest())
"""
SERVE = f"""
touch {RESULTS}/served
$4 -m thinwire serve --listen host0:29700 --secret-file "$3" --keep "$2" --service timeout_s=$1 \\
    --service heartbeat_s=0.2 --service first_workers={REPLICAS} --service total_tokens={REPLICAS * STEPS} \\
    --service merge.every={EVERY} \\
    > {RESULTS}/served &
while [ $(grep -c " left\\| lost" {RESULTS}/served) -lt {REPLICAS} ]; do sleep 0.1; done
kill -TERM $!; wait $!
"""


def result_of(kept: Path, timeout_s: float, *stalls: Stall) -> LabResult:
    cluster = build_cluster(*((f"host{index}", "switch") for index in range(REPLICAS + 1)))
    secret = kept / "secret"
    secret.write_text("known to these hosts alone")
    loop = kept / "loop.py"
    loop.write_text(LOOP)
    served = ("sh", "-c", SERVE, "serve", str(timeout_s), str(kept), str(secret), sys.executable)
    processes = [Process("host0", served, FIRST_CARD, begins="begun")]
    for index in range(REPLICAS):
        processes.append(Process(f"host{index + 1}", (sys.executable, str(loop), "ab"[index], str(secret)), FIRST_CARD))
    return launch(cluster, processes, LabOptions(stalls=stalls, notice_s=30))


def short_silence(folder: Path) -> LabResult:
    return result_of(folder, 30, Stall("host2", 0.5, 2.0))


def long_silence(folder: Path) -> tuple[LabResult, bool]:
    """What came of it, and whether the server kept its weights."""
    return result_of(folder, 6, Stall("host2", 0.5, 60.0)), (folder / "server-0.pt").is_file()


AT_ONCE = (short_silence, long_silence)


@pytest.mark.lab
@pytest.mark.timeout(120)
@pytest.mark.long
def test_short_silence_of_a_replica_changes_nothing(under_way: dict[Callable, Future]) -> None:
    short = under_way[short_silence].result()
    assert short.failure is None, short.failure
    assert short.results["a"] == short.results["b"] and " lost" not in short.results["served"]


@pytest.mark.lab
@pytest.mark.timeout(120)
@pytest.mark.long
def test_long_silence_of_a_replica_ends_it_alone(under_way: dict[Callable, Future]) -> None:
    long, kept = under_way[long_silence].result()
    # Whoever notices first: the watch, or a message that was on its way.
    assert re.search(" b on host2 lost: (worker b on host2 )?was silent for 6 s", long.results["served"])
    assert " a on host1 left" in long.results["served"]
    assert long.exit_codes == {"host0": 0, "host1": 0, "host2": 1}
    assert long.failure and long.failure.startswith("host2: exit code 1: ")
    assert "server 0 on host0 was silent for 6 s; raise timeout_s" in long.failure
    assert kept and "b" not in long.results
