"""The listener: it is where it was asked to be, authenticates who comes, and a stranger's bytes cost that connection alone."""

import os
import random
import socket
import struct
import threading
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import long
from hypothesis import given
from hypothesis import strategies as st
from services import answer, any_answer, greeted, serving, together, wait_for
from test_server_diloco import EVERY, REPLICAS, ROUNDS, reference, service_of, train
from test_server_gradients import NUMEL, make_model
from test_server_progress import starts

from command import one_line, started, thinwire
from thinwire import AsyncDiLoCo
from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Code, DiLoCo, Service
from thinwire.errors import UserError
from thinwire.sync.server.authentication import OPEN, Handshake, introduce
from thinwire.sync.server.coding import coded_bytes, make_flat
from thinwire.sync.server.connection import Connection, PeerLost
from thinwire.sync.server.dialer import Dialer
from thinwire.sync.server.extent import Extent
from thinwire.sync.server.listener import STRANGERS
from thinwire.sync.server.message import HEAD_BYTES, BadMessage, Head, Hello, Kind
from thinwire.sync.server.weights import load_optimizers

LISTENING = "0A"


def listening(pid: int) -> list[str]:
    """The TCP sockets on which a process listens, as /proc shows them."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(fd))
        except OSError:
            continue
    found = []
    for file in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{file}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in inodes:
                raw, port = fields[1].split(":")
                words = b"".join(struct.pack("=I", int(raw[first : first + 8], 16)) for first in range(0, len(raw), 8))
                host = socket.inet_ntop(socket.AF_INET if file == "tcp" else socket.AF_INET6, words)
                found.append(f"{host}:{int(port, 16)}")
    return found


def address_of(process) -> str:
    """Where it serves."""
    return process.stdout.readline().removeprefix("serving at ").strip()


def secret_in(folder: Path, text: str = "a secret of many letters") -> Path:
    path = folder / "secret"
    path.write_text(text + "\n")
    return path


@pytest.mark.parametrize(
    ("option", "bind", "host"),
    [("--bind", "127.0.0.1:0", "127.0.0.1"), long("--listen", "127.0.1.1:0", "127.0.1.1"), ("--bind", "0.0.0.0:0", "0.0.0.0")],
)
def test_serve_listens_where_it_is_asked_to_and_nowhere_else_and_is_found_there(tmp_path, option, bind, host) -> None:
    """A name that is 127.0.1.1 here, and all addresses, gave no worker a place that it does not know."""
    secret = ["--secret-file", str(secret_in(tmp_path))] if host == "0.0.0.0" else []
    with started("serve", option, bind, *secret, "--service", "servers=2", cwd=tmp_path) as process:
        address = address_of(process)
        assert listening(process.pid) == [address] and address.startswith(host + ":")
        dialed = address.replace("0.0.0.0", "127.0.0.2")  # an address of this machine that nobody was given
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        file = tmp_path / "secret" if secret else None
        with AsyncDiLoCo(model, optimizer, store=dialed, name="a", every=1, secret_file=file) as replica:
            optimizer.step()
            assert replica.client.versions == [1, 1]
        assert listening(process.pid) == [address]
        process.terminate()
        out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert out.count("a on ") == 4 and " left" in out


def test_serve_answers_prometheus(tmp_path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with started("serve", "--bind", "127.0.0.1:0", "--metrics-port", str(port), cwd=tmp_path) as process:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with AsyncDiLoCo(model, optimizer, store=address_of(process), name="a", every=1):
            optimizer.step()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        process.terminate()
        assert process.wait(timeout=20) == 0
    values = {line.split('{server="0"} ')[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}
    assert values["thinwire_server_version"] == values["thinwire_server_workers"] == 1
    numel = sum(one.numel() for one in model.parameters())
    sent, received = (values[f"thinwire_server_{which}_bytes_total"] for which in ("sent", "received"))
    assert sent >= 4 * numel and received >= 8 * numel  # first weights, a push, and what became of it


def test_ipv6_is_an_address_like_any_other(tmp_path) -> None:
    if not Path("/proc/net/if_inet6").read_text().strip():
        assert "--bind [::1]:0" in one_line(thinwire("serve", "--bind", "[::1]:0", cwd=tmp_path).stderr)
        return
    with started("serve", "--bind", "[::1]:0", cwd=tmp_path) as process:
        address = address_of(process)
        assert address.startswith("[::1]:") and listening(process.pid) == [address.replace("[", "").replace("]", "")]
        greeted(address, "a", NUMEL).close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bind", "0.0.0.0:0"], "others reach that, so give a --secret-file"),
        (["--bind", "nonsense"], "write host:port"),
        (["--bind", "::1:29700"], "[address]:port for IPv6"),
        (["--bind", "192.0.2.1:0"], "take another port, or an address of this machine"),
        (["--secret-file", "nowhere"], "head -c 32 /dev/urandom"),
        (["--bind", "127.0.0.1:0", "--secret-file", "short"], "short has 3 bytes, which can be guessed"),
    ],
)
def test_serve_says_in_one_line_where_it_cannot_be_or_not_safely(tmp_path, arguments, words) -> None:
    (tmp_path / "short").write_text("abc\n")
    done = thinwire("serve", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in one_line(done.stderr)


def test_who_does_not_know_the_secret_is_turned_away_in_one_line(tmp_path) -> None:
    right, other = secret_in(tmp_path), tmp_path / "other"
    other.write_text("another secret of many letters")
    with serving(service_of(), secret=right) as running:
        for file, words in ((None, "it asks for a secret; give secret_file"), (other, "its secret is not that of secret_file")):
            began = time.monotonic()
            with pytest.raises(UserError, match=words) as caught:
                Dialer(running.address, file).service()
            assert "\n" not in str(caught.value) and time.monotonic() - began < 20
        assert Dialer(running.address, right).service() == service_of()
        assert not running.servers[0].events and not running.failures
    with serving(service_of()) as running, pytest.raises(UserError, match="its secret is not that of secret_file"):
        Dialer(running.address, right).service()


def test_what_answers_and_is_no_service_is_named() -> None:
    """It sends what is no challenge; it must not be waited for until the end of time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answers() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall((30).to_bytes(4, "big") + b"HTTP/1.1 400 Bad Request\r\n\r\n..")
                sock.recv(100)

        thread = threading.Thread(target=answers, daemon=True)
        thread.start()
        with pytest.raises(UserError, match="what answers there is no parameter service of this version"):
            Dialer(f"127.0.0.1:{listener.getsockname()[1]}").service()
        thread.join(10)


def test_the_time_for_a_challenge_is_for_all_of_it_together() -> None:
    """A stranger who sends a byte now and then holds the line no longer than one who sends none."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stop = threading.Event()

    def drips() -> None:
        theirs.sendall((200).to_bytes(4, "big"))
        while not stop.wait(0.05):
            theirs.sendall(b"x")

    thread = threading.Thread(target=drips, daemon=True)
    thread.start()
    with pytest.raises(TimeoutError):
        Handshake(ours, 0.5).recv_bytes(256)
    stop.set()
    thread.join(10)
    ours.close()
    theirs.close()


def test_a_name_that_is_loopback_here_is_served_as_that_and_printed_as_that(tmp_path) -> None:
    """As a machine's own name often is, 127.0.1.1; this is a name that is so everywhere, and not the one that everybody knows."""
    with started("serve", "--bind", "LOCALHOST:0", cwd=tmp_path) as process:
        line = process.stdout.readline()
        assert line.startswith("serving at 127.0.0.1:") and "LOCALHOST here and which no other machine can reach" in line
        assert listening(process.pid) == [line.split()[2]]


def test_a_server_that_dies_of_its_own_ends_serve_with_one_line(tmp_path) -> None:
    """It cannot write what it is to keep."""
    keep = tmp_path / "kept"
    (keep / "server-1.part").mkdir(parents=True)
    with started("serve", "--bind", "127.0.0.1:0", "--keep", str(keep), "--service", "servers=2", cwd=tmp_path) as process:
        address = address_of(process)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(PeerLost, match=r"server \d on \S+ (is gone|has given this worker up: the service ends)"):
            AsyncDiLoCo(model, optimizer, store=address, name="a", every=1).__enter__()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "server 1 died of" in one_line(errors)


def of_this_process(field: str) -> int:
    """kB of memory, or a number."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def dialed(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=20)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # thousands of them leave nothing behind
    return sock


def random_head(chance: random.Random) -> bytes:
    """Of a known kind mostly, with numbers from everywhere, and with any announced length."""
    number = partial(chance.choice, [0, 1, -1, 2**40, -(2**63), 2**63 - 1, 64, 4 * NUMEL, chance.getrandbits(63)])
    real = partial(chance.choice, [0.0, 1.0, -1.0, float("nan"), float("inf"), 1e308])
    return struct.pack("<qqqqddqd", chance.choice([*Kind, 0, 99]), number(), number(), number(), real(), real(), number(), real())


def nobody(address: str, chance: random.Random) -> int:
    """Somebody who knows no key; returns how many messages he has sent."""
    with dialed(address) as sock:
        match chance.randrange(4):
            case 0:
                return 1
            case 1:
                sock.sendall(chance.randbytes(chance.randrange(1, 3000)))
            case 2:
                sock.sendall(chance.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff" + bytes(100), b"\0\0\0\x10" + bytes(3)]))
            case 3:
                sock.recv(100)
                sock.sendall((16).to_bytes(4, "big") + chance.randbytes(16))
        return 1


def somebody(address: str, chance: random.Random) -> int:
    """One who knows the key and no manners."""
    with dialed(address) as sock:
        sock.setblocking(False)
        introduce(sock, OPEN)
        sock.settimeout(20)
        match chance.randrange(3):
            case 0:
                sock.sendall(random_head(chance) + chance.randbytes(100))
                return 1
            case 1:
                payload = chance.choice([b"{}", b"[" * 1000, b"\xff" * 9, b'{"server": 0}', b"1" * 1000, chance.randbytes(200)])
                sock.sendall(Head(kind=Kind.HELLO, payload_bytes=len(payload)).packed() + payload)
                return 1
        hello = Hello(
            server=0, name=f"junk{chance.randrange(20)}", incarnation=0, host="j", numel=NUMEL, every=0, tokens_per_step=1.0
        )
        data = hello.packed().numpy().tobytes()
        sock.sendall(Head(kind=Kind.HELLO, payload_bytes=len(data)).packed() + data)
        for _ in range(20):  # what may come, with numbers that mean nothing here
            sock.sendall(Head(kind=Kind.PROGRESS, step=chance.getrandbits(60), weight=float("nan")).packed())
        sock.sendall(last_message(chance))
        while sock.recv(2**16):  # until it is closed
            pass
        return 22


def last_message(chance: random.Random) -> bytes:
    """What costs a worker its connection: no head at all, or first weights, or a push, that cannot be."""
    floats = torch.full((NUMEL,), chance.choice([float("nan"), float("inf")])).numpy().tobytes()
    push = {"kind": Kind.PUSH, "version": 0, "weight": 1.0, "local_steps": 1}
    good = torch.ones(NUMEL).numpy().tobytes()
    match chance.randrange(6):
        case 0:
            return struct.pack("<q", 77) + random_head(chance)[8:]
        case 1:
            return Head(**push, payload_bytes=chance.choice([0, 4, 4 * NUMEL + 4, 2**40])).packed() + good
        case 2:
            return Head(**push, payload_bytes=4 * NUMEL).packed() + floats
        case 3:
            wrong = chance.choice([{"weight": -1.0}, {"local_steps": 0}, {"version": 2**50}, {"learning_rate": -1.0}])
            return Head(**push | wrong, payload_bytes=4 * NUMEL).packed() + good
        case 4:
            size = 4 * NUMEL + 24
            return Head(kind=Kind.INIT, local_steps=1, step=9, payload_bytes=size).packed() + chance.randbytes(size)
    return Head(kind=Kind.INIT, local_steps=2**50, payload_bytes=2**50).packed() + good


@pytest.mark.timeout(180)
@pytest.mark.parametrize("messages", [1000, long(10_000)])
def test_thousands_of_messages_of_strangers_cost_nobody_else_anything(messages: int) -> None:
    """Honest replicas train meanwhile, to the very result that they have alone."""
    sent: Counter[int] = Counter()
    most_threads, stop = [0], threading.Event()
    with serving(service_of(weighting="equal")) as running:
        merger = running.servers[0].merger

        def attack(seed: int) -> None:
            wait_for(lambda: merger.version >= 1)  # all honest ones are there
            chance = random.Random(seed)
            while sum(sent.values()) < messages:
                try:
                    sent[seed] += (nobody if seed % 2 else somebody)(running.address, chance)
                except OSError:  # turned away in the middle of it
                    sent[seed] += 1
                most_threads[0] = max(most_threads[0], threading.active_count())
            stop.set()

        def honest(replica: int) -> None:
            train(running.address, replica, EVERY * ROUNDS)

        def hold(member, patience_s, admit=merger.admit):
            """Nobody begins the last round before the last stranger has gone."""
            if merger.version == ROUNDS - 1 and not stop.is_set():
                time.sleep(min(0.05, patience_s))
                return None
            return admit(member, patience_s)

        merger.admit = hold
        load_optimizers()  # what torch loads with its first optimizer is not theirs
        before_kb, threads = of_this_process("VmRSS"), threading.active_count()
        together(
            *(partial(honest, replica) for replica in range(REPLICAS)),
            *(partial(attack, seed) for seed in range(4)),
            timeout_s=170,
        )
        wait_for(lambda: threading.active_count() <= threads + 2)
        assert not running.failures and merger.version == ROUNDS
        torch.testing.assert_close(running.weights(), reference([1.0] * REPLICAS), rtol=0, atol=1e-6)
        assert {event.why for event in running.servers[0].events if event.worker.startswith("r")} == {""}
        assert most_threads[0] <= threads + 2 * REPLICAS + 4 + STRANGERS + 40
        assert of_this_process("VmRSS") - before_kb < 64 * 1024
    assert sum(sent.values()) >= messages


@pytest.mark.long
def test_a_crowd_of_strangers_is_bounded_and_lets_honest_ones_in() -> None:
    with serving(service_of()) as running:
        before = threading.active_count()
        crowd = [dialed(running.address) for _ in range(3 * STRANGERS)]
        wait_for(lambda: threading.active_count() > before + STRANGERS / 2)
        assert Dialer(running.address).service() == service_of()
        wait_for(lambda: threading.active_count() <= before + STRANGERS)
        for sock in crowd:
            sock.close()
        wait_for(lambda: threading.active_count() <= before)


def test_a_payload_takes_memory_only_as_it_arrives() -> None:
    """First weights of 4 GiB are announced, as the service allows; 8 MiB of them come."""
    numel = 2**30
    with serving(Service(merge=DiLoCo(), timeout_s=60)) as running:
        link = greeted(running.address, "a", numel)
        before_kb, virtual_kb = of_this_process("VmRSS"), of_this_process("VmSize")
        data = Head(kind=Kind.INIT, local_steps=1, step=1, payload_bytes=4 * numel + 24).packed()
        link.sock.setblocking(True)
        link.sock.sendall(data + bytes(2**23))
        wait_for(lambda: of_this_process("VmRSS") > before_kb + 2**12)
        time.sleep(0.3)
        assert of_this_process("VmRSS") - before_kb < 2**16 and of_this_process("VmSize") - virtual_kb < 2**19
        link.cut()
        link.close()
        with pytest.raises(UserError, match=f"a model of {numel + 1} values for a server, where most_values is {numel}"):
            greeted(running.address, "b", numel + 1)


@pytest.mark.parametrize("kind", ["none", "int8", "int4", "fp4", "sign", "ternary", "codebook2", "topk"])
def test_bytes_that_are_no_code_are_refused_and_never_spread(kind) -> None:
    chance = random.Random(0)
    merge = DiLoCo(
        learning_rate=1e-6, momentum=0.0
    )  # finite values of any size are taken, and none may reach infinity by themselves
    with serving(Service(merge=merge, push=Code(kind=kind), timeout_s=60)) as running:
        first = greeted(running.address, "a", NUMEL)
        starts(first)
        first.send(Head(kind=Kind.PULL))
        answer(first)
        first.close()
        size = coded_bytes(make_flat(Code(kind=kind)), Extent(NUMEL))
        for attempt in range(20):
            link = greeted(running.address, f"b{attempt}", NUMEL)
            payload = torch.frombuffer(bytearray(b"\xff" * size if attempt == 0 else chance.randbytes(size)), dtype=torch.uint8)
            link.send(Head(kind=Kind.PUSH, weight=1.0, local_steps=1), payload)
            assert answer(link)[0].kind in (Kind.REFUSED, Kind.WEIGHTS)  # most codes of bytes are finite values
            link.close()
        assert torch.isfinite(running.weights()).all() and not running.failures


@given(st.binary(min_size=HEAD_BYTES, max_size=HEAD_BYTES), st.binary(max_size=300))
def test_no_bytes_are_taken_for_a_message_that_they_are_not(head: bytes, payload: bytes) -> None:
    with suppress(BadMessage):
        assert Head.unpacked(head).payload_bytes >= 0
    with pytest.raises(BadMessage):
        Hello.unpacked(torch.frombuffer(bytearray(payload + b"\0"), dtype=torch.uint8))


@given(
    st.sampled_from(list(Kind)), st.integers(0, 2**61), st.integers(-1, 2**61), st.floats(0, 1e9) | st.none(), st.floats(0, 1e18)
)
def test_a_head_is_what_was_packed(kind: Kind, step: int, version: int, rate: float | None, weight: float) -> None:
    head = Head(kind=kind, step=step, version=version, learning_rate=rate, weight=weight, payload_bytes=step)
    assert Head.unpacked(head.packed()) == head and len(head.packed()) == HEAD_BYTES


def test_a_link_reads_nothing_of_a_size_that_was_not_agreed() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    link = Connection(ours, ("worker a", "nowhere"), Ledger(), 5.0)
    theirs.sendall(Head(kind=Kind.PUSH, payload_bytes=2**61).packed())
    with pytest.raises(BadMessage, match="where 8 were due"):
        link.receive(lambda head: 8)
    theirs.sendall(Head(kind=Kind.PUSH, payload_bytes=2**61).packed())
    with pytest.raises(BadMessage, match="where 8 are the most"):
        link.receive(lambda head: range(9))
    theirs.sendall(Head(kind=Kind.PUSH, payload_bytes=3).packed() + b"abc")
    assert link.receive(any_answer)[1].tolist() == [97, 98, 99]
    theirs.close()
    link.close()
