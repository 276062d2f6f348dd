"""Chosen collectives over NCCL: what can be said of it without a GPU, and on GPUs the results. Its order of messages is in
`schedules/test_compiler` and `test_scheduled`, on a network without tags."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import thinwire
from fake_stream import Device
from thinwire.collectives.backend import MeteredGroup
from thinwire.collectives.clock import DeviceClock
from thinwire.collectives.ledger import Ledger
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


class Launching:
    """An inner group of a device: a call enqueues a second of work, and what it gives is there for whoever waits on a stream."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def allreduce(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        self._device.enqueue(1.0)
        if not opts.asyncOp:
            return None
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(tensors)
        return SimpleNamespace(get_future=lambda: future)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_seconds_are_those_of_the_device_and_not_of_the_launch(asynchronous: bool) -> None:
    device, ledger = Device(), Ledger()
    group = MeteredGroup(ledger, Launching(device))
    group._clock = DeviceClock(device.event)
    opts = dist.AllreduceOptions()
    opts.asyncOp = asynchronous
    for _ in range(3):
        group.allreduce([torch.ones(4)], opts)
    (total,) = ledger.snapshot().values()
    assert (total.calls, total.seconds) == (3, 0.0)  # the host is ahead, and does not wait
    device.reach(device.end_s)
    (total,) = ledger.snapshot().values()
    assert total.seconds == pytest.approx(3.0) and device.waits == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.timeout(300)
def test_every_call_gives_what_it_means_on_devices() -> None:
    script = Path(__file__).with_name("nccl_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torch.cuda.device_count()}"]
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=280, cwd=script.parent)
    assert done.returncode == 0, done.stderr
