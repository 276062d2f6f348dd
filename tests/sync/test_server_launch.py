"""`thinwire replicas` as a user starts it: a replica is killed, a server is killed, the run goes on; nothing is left behind."""

import json
import os
import signal
import stat
from pathlib import Path

import pytest
from services import wait_for
from test_server_open import listening

from command import nothing_left, one_line, running, started, thinwire
from thinwire.errors import UserError
from thinwire.sync.server.dialer import Dialer
from thinwire.sync.server.snapshots import load

TEXT = "thin wire ring tree rank slow link loss step send " * 1200


def arguments(folder: Path, steps: int) -> list[str]:
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    train = {"steps": steps, "micro_batch": 2, "sequence": 16, "log_every": 5, "eval_tokens": 512, "warmup_steps": 2}
    data = {"source": str(text), "cache": str(folder / "cache")}
    model = {"layers": 2, "width": 16, "heads": 2, "context": 16}
    sections = {"train": train | {"run": str(folder / "run")}, "data": data, "model": model}
    changes = [f"{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()]
    return [
        *("replicas", "--replicas", "2", "--service", "merge.every=10", "--service", "heartbeat_s=0.1"),
        *(part for change in changes for part in ("--set", change)),
    ]


def pids(cwd: Path, role: str, number: int) -> list[int]:
    return [pid for pid in running(cwd) if Path(f"/proc/{pid}/comm").read_text().strip() == f"{role} {number}"]


def read_until(stream, words: str) -> list[str]:
    lines = []
    for line in stream:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError("".join(lines))


@pytest.mark.long
def test_a_killed_replica_comes_back_and_the_other_does_not_stop(tmp_path) -> None:
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with started(*arguments(tmp_path, 150), cwd=tmp_path, **variables) as process:
        read_until(process.stdout, "replica 1  step 20 ")
        os.kill(pids(tmp_path, "replica", 1)[0], signal.SIGKILL)
        output, errors = process.communicate(timeout=50)
    assert process.returncode == 0, errors
    assert "was ended by SIGKILL; started again, 1 of 1" in output and "held-out loss of the servers' weights" in output
    found = json.loads((tmp_path / "run" / "replicas.json").read_text())
    assert found["restarts"] == {"r0": 0, "r1": 1} and sum(found["steps"].values()) in (300, 301)
    assert found["servers"][0]["merged_tokens"] == 2 * 16 * sum(found["steps"].values())
    assert min(found["steps"].values()) >= 10  # what one misses the other does: the sum above, however they share it
    events = [(event["worker"], event["what"], event["incarnation"]) for event in found["servers"][0]["events"]]
    assert sorted(events) == [
        *(("r0", "joined", 1), ("r0", "left", 1)),
        *(("r1", "joined", 1), ("r1", "joined", 2), ("r1", "left", 2), ("r1", "lost", 1)),
    ]
    assert found["held_out_loss"] < 2.9
    assert nothing_left(tmp_path)


@pytest.mark.long
def test_a_replica_that_dies_for_good_before_it_joins_is_not_waited_for(tmp_path) -> None:
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = arguments(tmp_path, 40)
    with started(*command, "--restart", "0", cwd=tmp_path, **variables) as process:
        wait_for(lambda: pids(tmp_path, "replica", 1))
        os.kill(pids(tmp_path, "replica", 1)[0], signal.SIGKILL)  # it loads the text, and has not dialed yet
        output, errors = process.communicate(timeout=50)
    assert process.returncode == 0, errors
    assert "replica 1 (process" in output and "was ended by SIGKILL; the others go on" in output
    found = json.loads((tmp_path / "run" / "replicas.json").read_text())
    assert found["steps"]["r0"] >= 80 and found["steps"]["r1"] == 0  # the one does the work of both
    assert not [event for event in found["servers"][0]["events"] if event["worker"] == "r0" and event["what"] == "lost"]


@pytest.mark.long
def test_several_servers_of_a_run_have_sockets_on_loopback_and_a_secret_of_their_own(tmp_path) -> None:
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with started(*arguments(tmp_path, 100_000), "--servers", "2", cwd=tmp_path, **variables) as process:
        read_until(process.stdout, "replica 0  step 10 ")
        spec = json.loads((tmp_path / "run" / "replicas-spec.json").read_text())
        servers = [pids(tmp_path, "server", index)[0] for index in range(2)]
        assert [listening(pid) for pid in servers] == [[address] for address in spec["addresses"]]
        assert all(address.startswith("127.0.0.1:") for address in spec["addresses"])
        assert not [listening(pid) for number in range(2) for pid in pids(tmp_path, "replica", number) if listening(pid)]
        assert not listening(process.pid)
        secret = tmp_path / "run" / "replicas-secret"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        with pytest.raises(UserError, match="it asks for a secret"):
            Dialer(",".join(spec["addresses"])).service()
        assert Dialer(",".join(spec["addresses"]), secret).service().servers == 2
        before = secret.read_text()
        wait_for((tmp_path / "run" / "server-1.pt").is_file)
        os.kill(process.pid, signal.SIGKILL)
        assert nothing_left(tmp_path)
    with started("replicas", "--resume", str(tmp_path / "run"), cwd=tmp_path, **variables) as process:
        read_until(process.stdout, "replica 0  step ")
        assert secret.read_text() != before
        os.kill(process.pid, signal.SIGKILL)
    assert nothing_left(tmp_path)


def test_nothing_is_left_when_the_launcher_or_a_server_is_killed_and_the_run_can_be_resumed(tmp_path) -> None:
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with started(*arguments(tmp_path, 100_000), cwd=tmp_path, **variables) as process:
        read_until(process.stdout, "replica 0  step 30 ")
        assert len(running(tmp_path)) == 4
        wait_for((tmp_path / "run" / "server-0.pt").is_file)
        os.kill(process.pid, signal.SIGKILL)
        assert nothing_left(tmp_path)
    done = load(tmp_path / "run" / "server-0.pt")["steps"]["r0"]
    assert done >= 10
    with started("replicas", "--resume", str(tmp_path / "run"), cwd=tmp_path, **variables) as process:
        line = read_until(process.stdout, "replica 0  step ")[-1]
        assert done < int(line.split("step ")[1].split()[0]) <= done + 10
        os.kill(pids(tmp_path, "server", 0)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=45)
    assert process.returncode == 3
    last = [line for line in errors.splitlines() if line.startswith("thinwire: error: ")]
    assert len(last) == 1 and "server 0 (process" in last[0] and "SIGKILL" in last[0] and "--resume" in last[0]
    assert nothing_left(tmp_path)


def test_what_replicas_cannot_do_is_refused(tmp_path) -> None:
    for wrong, words in (
        (["--set", "compress.kind=int8"], "--service push.kind"),
        (["--service", "merge.quorum=-1"], "merge"),
        (["--resume", "nowhere"], "no run of replicas was made there"),
    ):
        done = thinwire("replicas", *wrong, cwd=tmp_path)
        assert done.returncode == 2 and words in one_line(done.stderr)
