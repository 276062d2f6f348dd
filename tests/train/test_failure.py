"""What is said of a failure: a lost rank is no full disk, and an address that leads nowhere is explained."""

import socket
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from thinwire.collectives.address import advice
from thinwire.environment import Place
from thinwire.errors import UserError
from thinwire.train.checkpoint.files import one_line
from thinwire.train.failure import Heartbeat, explain, symptom


def failed(cause: Exception) -> dcp.api.CheckpointException:
    return dcp.api.CheckpointException("write", {0: dcp.api._wrap_exception(cause)})


def test_a_lost_rank_is_told_from_a_full_disk() -> None:
    gone = RuntimeError("[../pair.cc] Connection closed by peer [127.0.0.1]:9")
    with pytest.raises(RuntimeError) as lost, one_line("checkpoint c", "written"):
        raise failed(gone)
    assert lost.value is gone and symptom(lost.value) == "lost"
    with pytest.raises(ConnectionResetError), one_line("checkpoint c", "written"):
        raise ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(UserError, match="checkpoint c cannot be written: disk is full"), one_line("checkpoint c", "written"):
        raise failed(OSError("disk is full"))


def test_an_address_that_is_nobody_elses_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is gloo's, as it came from a host whose own name is 127.0.1.1."""
    refused = RuntimeError("[enforce fail at pair.cc:168] connect [127.0.0.1]:55: Connection refused, remote=[127.0.1.1]:29511")
    monkeypatch.setattr(socket, "gethostname", lambda: "ubuntu2")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    line = explain(refused, None).line
    assert "a rank offered 127.0.1.1, its own machine: here ubuntu2 resolves to 127.0.1.1 (/etc/hosts)" in line
    assert "set GLOO_SOCKET_IFNAME on each host" in line and "\n" not in line
    assert advice("Connection refused, remote=[10.0.0.2]:29511") == "" == advice("Connection reset by peer")


class Slow:
    """A store far away."""

    def __init__(self, store: Any) -> None:
        self.store, self.asked = store, threading.Event()

    def set(self, key: str, value: str) -> None:
        if value != "0" and key.startswith("beat"):
            self.asked.set()
            time.sleep(0.2)
        self.store.set(key, value)


def test_no_heartbeat_is_under_way_when_the_run_is_over() -> None:
    """It would come back while the interpreter ends, which aborts the process."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = Place(rank=0, world_size=1, local_rank=0, master_address="127.0.0.1", master_port=server.port)
    heartbeat = Heartbeat(place, "here", timeout_s=10.0)
    heartbeat._store = slow = Slow(heartbeat._store)
    with heartbeat:
        assert slow.asked.wait(5)
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
