"""What is said of a failure: a lost rank is no full disk, and an address that leads nowhere is explained."""

import socket

import pytest
import torch.distributed.checkpoint as dcp

from thinwire.collectives.address import advice
from thinwire.errors import UserError
from thinwire.train.checkpoint.files import one_line
from thinwire.train.failure import explain, symptom


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
