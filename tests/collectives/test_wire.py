"""The wire formulas: laws that hold for any group, and the kernel's own byte counters as witness for gloo's algorithms."""

import os
import socket
import struct
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pool import Pool, Rank
from thinwire.collectives.wire import OPS, flows, sent_bytes
from thinwire.errors import UserError

TCP_INFO_BYTES_RECEIVED = 128
"""Offset of tcpi_bytes_received in Linux's struct tcp_info."""

groups = st.integers(1, 17).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, p - 1)))
sizes = st.integers(0, 1 << 20)


def sent_and_received(op: str, n: int, p: int, root: int) -> tuple[Counter[int], Counter[int]]:
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for source, target, size in flows(op, n, p, root):
        sent[source] += size
        received[target] += size
    return sent, received


@given(st.sampled_from([op for op in OPS if op != "send"]), sizes, groups)
def test_flows_join_different_ranks_of_the_group_and_add_up_to_what_each_rank_sends(op, n, group) -> None:
    p, root = group
    for source, target, size in flows(op, n, p, root):
        assert source != target and 0 <= source < p and 0 <= target < p and size >= 0
    sent, _ = sent_and_received(op, n, p, root)
    assert [sent[rank] for rank in range(p)] == [sent_bytes(op, n, p, rank, root) for rank in range(p)]


@pytest.mark.parametrize("op", OPS)
def test_a_group_of_one_sends_nothing(op) -> None:
    assert flows(op, 4096, 1) == ()
    assert op == "send" or sent_bytes(op, 4096, 1, 0) == 0


@given(sizes, groups)
def test_symmetric_ops_send_and_receive_the_same_on_each_rank(n, group) -> None:
    p, _ = group
    n *= p
    for op, expected in [
        ("all_reduce", 2 * (p - 1) * n // p),
        ("reduce_scatter", 2 * (p - 1) * n // p),
        ("all_gather", (p - 1) * n),
        ("all_to_all", (p - 1) * n // p),
    ]:
        sent, received = sent_and_received(op, n, p, 0)
        assert sent == received
        assert all(sent[rank] == expected for rank in range(p)), op


@given(st.integers(1, 1 << 20), groups)
def test_broadcast_gives_every_rank_the_message_once_and_from_one_that_has_it(n, group) -> None:
    p, root = group
    have = {root}
    for source, target, size in flows("broadcast", n, p, root):
        assert source in have and target not in have and size == n
        have.add(target)
    assert have == set(range(p))


@given(groups)
def test_broadcast_ends_after_the_least_number_of_rounds(group) -> None:
    p, root = group
    ready = {root: 0}
    next_free = {root: 0}
    for source, target, _ in flows("broadcast", 1, p, root):
        done = max(ready[source], next_free[source]) + 1
        next_free[source] = next_free[target] = ready[target] = done
    assert max(ready.values()) == (p - 1).bit_length()


@given(sizes, groups)
def test_gather_and_scatter_are_each_other_backwards(n, group) -> None:
    p, root = group
    assert {(b, a, size) for a, b, size in flows("gather", n, p, root)} == set(flows("scatter", n, p, root))
    sent, received = sent_and_received("gather", n, p, root)
    assert received[root] == (p - 1) * n and sent[root] == 0


@given(sizes, groups)
def test_reduce_brings_each_part_to_the_root(n, group) -> None:
    p, root = group
    n *= p
    sent, received = sent_and_received("reduce", n, p, root)
    part = n // p
    assert sent.total() == received.total() == (p - 1) * n + (p - 1) * part
    assert received[root] == 2 * (p - 1) * part
    assert all(sent[rank] == (n if p > 1 else 0) for rank in range(p) if rank != root)


@given(sizes, st.integers(2, 17), st.data())
def test_send_is_charged_to_the_sender_and_recv_to_nobody(n, p, data) -> None:
    peer = data.draw(st.integers(1, p - 1))
    assert flows("send", n, p, peer) == ((0, peer, n),)
    assert sent_bytes("send", n, p, data.draw(st.integers(0, p - 1)), peer) == n
    assert sent_bytes("recv", n, p, peer) == 0


def test_an_unknown_op_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown collective 'all_recude'; known: all_reduce, .*barrier$"):
        flows("all_recude", 1, 4)


def issue(op: str, n: int, root: int, group: dist.ProcessGroup) -> None:
    p, rank = group.size(), group.rank()
    message = torch.zeros(n, dtype=torch.uint8)
    parts = [torch.zeros(n, dtype=torch.uint8) for _ in range(p)]
    match op:
        case "all_reduce":
            dist.all_reduce(message, group=group)
        case "reduce_scatter":
            dist.reduce_scatter_tensor(torch.zeros(n // p, dtype=torch.uint8), message, group=group)
        case "all_gather":
            dist.all_gather(parts, message, group=group)
        case "all_to_all":
            dist.all_to_all_single(torch.zeros_like(message), message, group=group)
        case "broadcast":
            dist.broadcast(message, root, group=group)
        case "reduce":
            dist.reduce(message, root, group=group)
        case "gather":
            dist.gather(message, parts if rank == root else None, root, group=group)
        case "scatter":
            dist.scatter(message, parts if rank == root else None, root, group=group)
        case "send" if rank == 0:
            dist.send(message, root, group=group)
        case "send" if rank == root:
            dist.recv(message, 0, group=group)
        case "barrier":
            dist.barrier(group)


def received_by_socket() -> dict[tuple[int, int], int]:
    """Payload bytes that have arrived on each TCP connection of this process, by (own port, peer's port)."""
    result = {}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                ports = connection.getsockname()[1], connection.getpeername()[1]
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        except (OSError, IndexError):  # gone meanwhile, not TCP, or only listening
            continue
        result[ports] = struct.unpack_from("Q", info, TCP_INFO_BYTES_RECEIVED)[0]
    return result


def bytes_by_socket(context: Rank, op: str, n: int, root: int, p: int) -> dict[tuple[int, int], int]:
    group = dist.new_group(list(range(p)))
    if context.rank >= p:
        return {}
    issue(op, n, root, group)
    dist.barrier(group)
    before = received_by_socket()
    dist.barrier(group)
    issue(op, n, root, group)
    dist.barrier(group)
    return {ports: total - before.get(ports, 0) for ports, total in received_by_socket().items()}


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="needs Linux's TCP_INFO")
@pytest.mark.parametrize(("p", "root"), [(3, 2), (8, 3)])
@pytest.mark.parametrize("op", [op for op in OPS if op != "recv"])
def test_the_kernel_counts_what_flows_say(ranks8: Pool, op, p, root) -> None:
    n = 120 * 1024
    sockets = ranks8.run(bytes_by_socket, op, n, root, p)
    owner = {ports: rank for rank in range(p) for ports in sockets[rank]}
    expected: Counter[tuple[int, int]] = Counter()
    for source, target, size in flows(op, n, p, root):
        expected[source, target] += size
    counted: Counter[tuple[int, int]] = Counter()
    for (own, peer), target in owner.items():
        source = owner.get((peer, own))
        if source is not None:
            counted[source, target] += sockets[target][own, peer]
    for pair in [(a, b) for a in range(p) for b in range(p) if a != b]:
        headers = counted[pair] - expected[pair]
        assert -8 <= headers < 4096, f"{pair}: {counted[pair]} bytes came, {expected[pair]} expected"
