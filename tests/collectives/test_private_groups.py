"""Groups of one's own: on whatever backend the user's group has, also one that was made without a name."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pool import LOOPBACK, Pool, Rank
from thinwire.collectives.groups import backend_of, give_timeout, private_copy, release, timeout_of
from warm import SOCKET, Warm, server

UNNAMED = """
import sys, torch, torch.distributed as dist, thinwire
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from thinwire.collectives.groups import backend_of

dist.init_process_group()
assert dist.get_backend() == "undefined" and backend_of(dist.group.WORLD, "cpu") == "gloo"
torch.manual_seed(0)
model = nn.Linear(64, 64)
replica = DistributedDataParallel(model)
exchange = thinwire.compress_gradients(replica, "int4")
replica(torch.ones(2, 64)).sum().backward()
exchange.detach()
sharded = fully_shard(nn.Linear(64, 64))
thinwire.compress_sharded(sharded)
sharded(torch.ones(2, 64)).sum().backward()
own = nn.Linear(64, 64)
optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
with thinwire.DiLoCo(own, optimizer, every=2, compress="int4") as outer:
    for _ in range(4):
        own(torch.ones(2, 64)).sum().backward()
        optimizer.step()
print("sent", outer.sent_bytes)
"""


@pytest.mark.long
def test_a_default_group_without_a_name_carries_everything(tmp_path: Path) -> None:
    (tmp_path / "unnamed.py").write_text(UNNAMED)
    environment = os.environ | {SOCKET: server(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "unnamed.py")]
    process = Warm([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, errors = process.communicate(timeout=50)
    assert process.returncode == 0, errors
    assert [int(line.split()[1]) > 0 for line in out.splitlines()] == [True, True]


def copies(context: Rank) -> list[tuple[str | None, str | None, timedelta, float]]:
    found = []
    for backend in ("gloo", None):
        group = dist.new_group(backend=backend, timeout=timedelta(seconds=33))
        copy = private_copy(group, "a copy")
        total = torch.ones(3)
        dist.all_reduce(total, group=copy)
        found.append((backend_of(copy, "cpu"), backend_of(copy, "xpu"), timeout_of(copy), float(total[0])))
        release(copy)
        release(copy)  # again is nothing
        give_timeout(group, timedelta(seconds=44)) if backend else None
        assert timeout_of(group) == timedelta(seconds=44 if backend else 33)
        release(group)
    return found


def test_copies_have_the_backend_and_the_time_out_of_the_group(ranks2: Pool) -> None:
    for found in ranks2.run(copies):
        assert found == [("gloo", None, timedelta(seconds=33), 2.0), ("thinwire", None, timedelta(seconds=33), 2.0)]
