"""Chosen collectives over NCCL: what can be said of it without a GPU, and on GPUs the results. Its order of messages is in
`schedules/test_compiler` and `test_scheduled`, on a network without tags."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed as dist

import thinwire
from thinwire.collectives.nccl import on_one_host
from thinwire.collectives.run.transport import Place
from thinwire.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^inner = 'nccl': torch \S+ has no CUDA device or no NCCL here; use inner = 'gloo'$"):
        thinwire.init(inner="nccl", world_size=1, rank=0, init_method="tcp://127.0.0.1:1")


@pytest.mark.parametrize(("hosts", "one"), [(["a", "a", "a"], True), (["a", "b", "a"], False), (["a"], True)])
def test_a_group_on_one_host_is_known_as_such_on_all_its_ranks(hosts: list[str], one: bool) -> None:
    store, found = dist.HashStore(), []

    def ask(rank: int) -> None:
        place = Place(store, rank, tuple(range(len(hosts))), timedelta(seconds=20))
        found.append(on_one_host(place, hosts[rank]))

    threads = [Thread(target=ask, args=(rank,)) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [one] * len(hosts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.timeout(300)
def test_every_call_gives_what_it_means_on_devices() -> None:
    script = Path(__file__).with_name("nccl_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torch.cuda.device_count()}"]
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=280, cwd=script.parent)
    assert done.returncode == 0, done.stderr
