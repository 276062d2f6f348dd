"""What listens where: nothing beyond the address that is said, and loopback where all is on one host."""

import os
import re
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from small_run import make_text

import listeners
from command import TINY_RUN, nothing_left, one_line, running, started, thinwire
from thinwire.collectives.store import open_store
from thinwire.environment import Place
from thinwire.errors import UserError
from thinwire.listening import ANYWHERE, listen, listen_where_called, means_loopback, own_addresses, parse_address, shown

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="listening sockets are read from /proc")
HAS_IPV6 = Path("/proc/net/if_inet6").exists() and "lo" in Path("/proc/net/if_inet6").read_text()
ADDRESSES = ["127.0.0.1", "127.0.1.1", "0.0.0.0", *(["::1", "::"] if HAS_IPV6 else [])]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_socket_listens_where_it_is_said_and_nowhere_else(address: str) -> None:
    before = listeners.of_process(os.getpid())
    with listen(address, 0, "a test") as sock:
        (found,) = [where for inode, where in listeners.of_process(os.getpid()).items() if inode not in before]
        assert found == address == sock.getsockname()[0]
        assert parse_address(shown(*sock.getsockname()[:2]), "it") == (address, sock.getsockname()[1])
        socket.create_connection((ANYWHERE.get(address, address), sock.getsockname()[1]), timeout=5).close()


def test_an_address_that_cannot_be_bound_is_one_line() -> None:
    for address, reason in (("192.0.2.7", "Cannot assign"), ("no.such.host.invalid", "is no address of this machine")):
        with pytest.raises(UserError, match=rf"^--bind {re.escape(address)}: .*{reason}"):
            listen(address, 0, f"--bind {address}")
    with listen("127.0.0.1", 0, "") as sock, pytest.raises(UserError, match=r"^here: Address already in use; take another port"):
        listen("127.0.0.1", sock.getsockname()[1], "here")


def test_of_several_addresses_the_one_stays_where_somebody_calls_and_the_call_is_not_lost() -> None:
    with listen("127.0.0.1", 0, "") as free:
        port = free.getsockname()[1]
    callers: list[socket.socket] = []

    def call() -> None:
        time.sleep(0.1)
        callers.append(socket.create_connection(("127.0.0.3", port), timeout=5))

    before = listeners.of_process(os.getpid())
    thread = threading.Thread(target=call)
    thread.start()
    with listen_where_called(["127.0.0.2", "127.0.0.3"], port, 5) as sock:
        thread.join()
        assert [where for inode, where in listeners.of_process(os.getpid()).items() if inode not in before] == ["127.0.0.3"]
        accepted, _ = sock.accept()
        with callers[0], accepted:
            callers[0].sendall(b"hello")
            assert accepted.recv(5) == b"hello"
    with pytest.raises(UserError, match=rf"no other host has called at 127.0.0.2:{port} for 0.05 s"):
        listen_where_called(["127.0.0.2"], port, 0.05)


def test_a_name_that_is_loopback_here_only_leaves_the_cards() -> None:
    assert [means_loopback(host) for host in ("localhost", "127.0.1.1", "::1", "10.0.0.1", "host0")] == [True] * 3 + [False] * 2
    for address in own_addresses("127.0.1.1"):
        assert own_addresses(address) == [address]
        with listen(address, 0, "a card"):
            pass


@pytest.mark.parametrize(
    ("place", "bind", "expected"),
    [
        ({"master_address": "127.0.0.1"}, "", "127.0.0.1"),
        ({"master_address": "localhost"}, "", "127.0.0.1"),
        ({"master_address": "some-host", "local_size": 1}, "", "127.0.0.1"),  # all ranks are here
        ({"master_address": "127.0.0.1"}, "0.0.0.0", "0.0.0.0"),
        *([({"master_address": "127.0.0.1"}, "::1", "::1"), ({"master_address": "h"}, "::", "::")] if HAS_IPV6 else []),
        ({"master_address": "127.0.0.1"}, "127.0.0.5", "127.0.0.5"),
    ],
)
def test_a_store_listens_at_one_address_and_its_ranks_find_it(place: dict[str, object], bind: str, expected: str) -> None:
    before = listeners.of_process(os.getpid())
    first = Place(**({"rank": 0, "world_size": 1, "local_rank": 0, "master_port": 0} | place))  # type: ignore[arg-type]
    store = open_store(first, 5, bind)
    assert [where for inode, where in listeners.of_process(os.getpid()).items() if inode not in before] == [expected]
    store.set("key", "value")
    assert store.host == ANYWHERE.get(expected, expected)


def test_ranks_of_a_host_whose_name_is_loopback_here_find_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian has it: others dial the name, which is 127.0.1.1 on the host itself."""
    known = own_addresses("127.0.1.1")
    if len(known) != 1:
        pytest.skip(f"this machine has the addresses {known}")
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *how, **named: resolve("127.0.1.1" if host == "me" else host, *how, **named)
    )
    with listen(known[0], 0, "") as free:
        port = free.getsockname()[1]
    both = [
        Place(rank=rank, world_size=2, local_rank=rank, master_address="me", master_port=port, local_size=0) for rank in (0, 1)
    ]
    before, stores = listeners.of_process(os.getpid()), {}
    threads = [threading.Thread(target=lambda one=one: stores.update({one.rank: open_store(one, 10)})) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {store.host for store in stores.values()} == {known[0]} and len(stores) == 2
    assert [where for inode, where in listeners.of_process(os.getpid()).items() if inode not in before] == known


def listening_while(folder: Path, *arguments: str, **variables: str) -> tuple[set[str], str, int]:
    """All addresses at which processes of the command ever listened; stderr; its exit code."""
    found: set[str] = set()
    with started(*arguments, cwd=folder, **variables) as process:
        while process.poll() is None:
            found |= listeners.of_processes(running(folder))
            time.sleep(0.02)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert nothing_left(folder)
    return found, errors, process.returncode


@pytest.mark.long
def test_training_on_one_host_listens_on_loopback_alone(tmp_path: Path) -> None:
    make_text(tmp_path / "text.txt")
    (tmp_path / "run.toml").write_text(TINY_RUN + "steps = 30\n")
    found, errors, code = listening_while(tmp_path, "train", "run.toml")
    assert code == 0, errors
    assert found == {"127.0.0.1"}


@pytest.mark.long
@pytest.mark.skipif(not HAS_IPV6, reason="there is no ::1")
def test_training_binds_its_store_where_it_is_said(tmp_path: Path) -> None:
    make_text(tmp_path / "text.txt")
    (tmp_path / "run.toml").write_text(TINY_RUN + "steps = 30\n")
    found, errors, code = listening_while(tmp_path, "train", "run.toml", "--bind", "::1")
    assert code == 0, errors
    assert found == {"127.0.0.1", "::1"}  # gloo's sockets and the store's


def test_replicas_on_one_host_listen_on_loopback_alone(tmp_path: Path) -> None:
    make_text(tmp_path / "text.txt")
    (tmp_path / "run.toml").write_text(TINY_RUN + "steps = 20\n")
    found, errors, code = listening_while(tmp_path, "replicas", "run.toml", "--replicas", "2")
    assert code == 0, errors
    assert found == {"127.0.0.1"}


def test_an_address_that_this_machine_has_not_ends_training_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TINY_RUN)
    make_text(tmp_path / "text.txt")
    done = thinwire("train", "run.toml", "--bind", "192.0.2.7", cwd=tmp_path)
    assert done.returncode == 2
    assert one_line(done.stderr).startswith("--bind 192.0.2.7, port 0: Cannot assign requested address; take")


def test_ranks_whose_launcher_has_the_store_do_not_bind_it(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TINY_RUN)
    with closing(listen("127.0.0.1", 0, "")) as taken:
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(taken.getsockname()[1]), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        done = thinwire("train", "run.toml", "--bind", "127.0.0.1", cwd=tmp_path, **variables)
    assert done.returncode == 2
    assert one_line(done.stderr) == "--bind 127.0.0.1: whoever started the ranks has opened the store already; leave --bind out"
