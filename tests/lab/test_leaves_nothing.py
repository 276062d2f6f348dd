"""Whatever ends a lab, no process, namespace, link or mount of it remains."""

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.lab

HANG = "trap '' INT TERM HUP; while true; do sleep 0.05; done"
ANSWER = "trap 'echo received' INT TERM; while true; do sleep 0.05; done"
FINISH = "trap 'echo finished; exit 0' INT TERM; while true; do sleep 0.05; done"


def wait_until(holds: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def traps(number: int, command: str) -> bool:
    """Whether that process ignores or handles by now all signals that its command traps."""
    wanted = sum(1 << (signal.Signals[f"SIG{name}"] - 1) for name in set(re.findall(r"\b(HUP|INT|USR1|TERM)\b", command)))
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{number}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return False
    return (int(lines["SigIgn"], 16) | int(lines["SigCgt"], 16)) & wanted == wanted


def started(lab) -> tuple[set[str], set[str]]:
    """Wait until both hosts run their command, beyond its traps. Returns the lab's networks and the cards of this machine."""

    def ready() -> set[str]:
        found = set()
        for number, command in lab.processes().items():
            if "trap" in command and "thinwire" not in command and traps(number, command):  # not those that only pass it on
                with suppress(OSError):
                    found.add(str(Path(f"/proc/{number}/ns/net").readlink()))
        return found

    wait_until(lambda: len(lab.networks()) == 3, f"the hosts did not start: {lab.processes()}")
    wait_until(lambda: len(ready()) == 2, "no hosts")
    return lab.networks(), set(os.listdir("/sys/class/net"))


def assert_gone(lab, networks: set[str], cards: set[str], timeout_s: float = 20.0) -> None:
    wait_until(lambda: not lab.processes(), "processes remain", timeout_s)
    assert set(os.listdir("/sys/class/net")) == cards
    wait_until(lambda: not held(networks), "a network is still held, by a process or a mount", timeout_s)


def held(networks: set[str]) -> bool:
    """Whether a process is in one of them, or has it mounted: for a moment one may that was copied while the lab ended."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mounts = (folder / "mountinfo").read_text()
            if str((folder / "ns" / "net").readlink()) in networks or any(network in mounts for network in networks):
                return True
        except OSError:
            continue
    return False


def waiting(folder: Path) -> str:
    """A command that goes on when the file "go" is there."""
    return f"trap : USR1; until [ -e {folder}/go ]; do sleep 0.05; done"


def find(lab, part: str) -> int:
    return next(pid for pid, line in lab.processes().items() if part in line)


@pytest.mark.parametrize("victim", ["supervisor", "unshare", "process 1", "process 1 stopped"])
def test_kill_nine(supervise, victim: str) -> None:
    lab = supervise(HANG, HANG)
    networks, cards = started(lab)
    if victim == "supervisor":
        lab.process.kill()
    elif victim == "unshare":
        os.kill(find(lab, "/unshare"), signal.SIGKILL)
    else:
        inside = max(pid for pid, line in lab.processes().items() if "thinwire.lab.inside" in line and "unshare" not in line)
        os.kill(inside, signal.SIGSTOP if "stopped" in victim else signal.SIGKILL)
        if "stopped" in victim:
            lab.process.kill()
    assert lab.process.wait(timeout=30) != 0
    assert_gone(lab, networks, cards)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_commands_and_they_end_cleanly(supervise, number: int) -> None:
    lab = supervise(FINISH, FINISH, grace_s=30)
    networks, cards = started(lab)
    lab.process.send_signal(number)
    out, _ = lab.process.communicate(timeout=30)
    assert lab.process.returncode == 0
    assert out.splitlines() == ["finished", f"None {int(number)}"]
    assert_gone(lab, networks, cards)


def test_a_command_that_ignores_the_signal_is_killed_after_the_grace(supervise) -> None:
    lab = supervise(FINISH, HANG, grace_s=0.3)
    networks, cards = started(lab)
    lab.process.send_signal(signal.SIGINT)
    out, _ = lab.process.communicate(timeout=30)
    assert lab.process.returncode == 128 + signal.SIGINT
    assert out.splitlines()[-1].startswith("stopped by SIGINT: host1: ended by SIGKILL")
    assert_gone(lab, networks, cards)


def test_commands_that_end_by_the_signal_are_no_further_news(supervise) -> None:
    lab = supervise("trap : USR1; sleep 60", "trap 'exit 143' TERM; while true; do sleep 0.05; done")
    networks, cards = started(lab)
    lab.process.send_signal(signal.SIGTERM)
    out, _ = lab.process.communicate(timeout=30)
    assert (out, lab.process.returncode) == ("stopped by SIGTERM 15\n", 143)
    assert_gone(lab, networks, cards)


def test_a_second_signal_does_not_wait_for_the_grace(supervise) -> None:
    lab = supervise(ANSWER, HANG, grace_s=60)
    networks, cards = started(lab)
    lab.process.send_signal(signal.SIGINT)
    assert lab.process.stdout.readline() == "received\n"  # or two at once may arrive as one
    lab.process.send_signal(signal.SIGINT)
    lab.process.communicate(timeout=30)
    assert lab.process.returncode == 128 + signal.SIGINT
    assert_gone(lab, networks, cards)


def test_the_others_are_ended_after_one_failed(supervise, tmp_path: Path) -> None:
    lab = supervise(f"{waiting(tmp_path)}; echo no disk >&2; exit 7", "trap : USR1; sleep 60")
    networks, cards = started(lab)
    (tmp_path / "go").touch()
    out, err = lab.process.communicate(timeout=30)
    assert lab.process.returncode == 7
    assert out.splitlines() == ["host0: exit code 7: no disk None"]
    assert err == "no disk\n"
    assert_gone(lab, networks, cards)


def test_what_the_commands_leave_in_the_background_ends_with_them(supervise, tmp_path: Path) -> None:
    lab = supervise(f"setsid sh -c 'trap : USR1; sleep 1000' & {waiting(tmp_path)}", waiting(tmp_path))
    networks, cards = started(lab)
    (tmp_path / "go").touch()
    lab.process.communicate(timeout=30)
    assert lab.process.returncode == 0
    assert_gone(lab, networks, cards)


def test_without_root(supervise) -> None:
    """An unprivileged user: in a user namespace as user 1000, without any capability."""
    lab = supervise(FINISH, FINISH, before=("unshare", "--user", "--map-user=1000", "--map-group=1000"))
    networks, cards = started(lab)
    assert "--map-root-user" in lab.processes()[find(lab, "/unshare")]
    os.kill(find(lab, "/unshare"), signal.SIGKILL)
    lab.process.communicate(timeout=30)
    assert lab.process.returncode != 0
    assert_gone(lab, networks, cards)
