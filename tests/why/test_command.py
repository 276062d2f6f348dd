"""`thinwire why` around a script of two ranks: the same bits as without it, and a verdict."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

import command
from warm import COMMAND, SOCKET, Warm, server

SCRIPT = str(Path(__file__).parent / "scripts" / "two_ranks.py")


def two_ranks(argv: list[str], cwd: Path) -> list[str]:
    """What they print; both must succeed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has: nobody else can take its port
    started = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        where |= {"GLOO_SOCKET_IFNAME": "lo", SOCKET: server()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(Warm(argv, cwd=cwd, env={**os.environ, **place, **where}, start_new_session=True, **pipes))
    printed = [process.communicate(timeout=50)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    return printed


@pytest.mark.long
def test_bits_are_those_of_the_script_and_the_verdict_is_written(tmp_path: Path) -> None:
    two_ranks([sys.executable, SCRIPT, "plain"], tmp_path)
    printed = two_ranks([*COMMAND, "why", "--steps", "12", "--json", "why.json", SCRIPT, "metered"], tmp_path)
    for rank in range(2):
        assert (tmp_path / f"metered-{rank}.txt").read_text() == (tmp_path / f"plain-{rank}.txt").read_text()
    assert "what a step is made of" in printed[0] and "what a step" not in printed[1]
    found = json.loads((tmp_path / "why.json").read_text())
    assert sorted(call["message_bytes"] for call in found["calls"])[0] == 4  # the script's own
    assert len(found["ranks"]) == 2 and found["links"] == []  # one host
    for row in found["ranks"]:
        terms = sum(value for key, value in row.items() if key.endswith("_s"))
        assert abs(terms - found["step_s"]) < 0.2 * found["step_s"]


def test_a_script_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = command.thinwire("why", "nothing.py", cwd=tmp_path)
    assert done.returncode == 2 and "there is no script nothing.py" in command.one_line(done.stderr)
