"""A rank that goes while a checkpoint is written is a lost rank, not a mistake of the user at the disk."""

import pytest
import torch.distributed.checkpoint as dcp

from thinwire.errors import UserError
from thinwire.train.checkpoint.files import one_line
from thinwire.train.failure import symptom


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
