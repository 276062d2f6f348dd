"""The explicit seam enters the same over the metered backend as over any other."""

import torch
import torch.distributed as dist

from pool import Pool, Rank
from tagless import Tagless, workless
from thinwire.collectives.backend import register
from thinwire.collectives.ledger import Call, Ledger, Total
from thinwire.collectives.metered_calls import all_gather, all_reduce, all_to_all, swap

N = 24


def through_the_seam(context: Rank, backend: str) -> tuple[float, list[tuple[Call, Total]]]:
    group = dist.group.WORLD if backend == "thinwire" else dist.new_group(backend=backend)
    x = torch.ones(N)
    all_reduce(x, group, context.ledger, "bucket 0").wait()
    return float(x.sum()), list(context.recorded().items())


def waited_for(context: Rank) -> tuple[list[float], dict[Call, Total]]:
    """By a metered group whose inner one gives no Work where nobody need wait: each call, and a barrier."""
    ledger = Ledger()
    register(ledger, "workless", lambda options, place: (workless(options, place), None))
    group = dist.new_group(backend="workless")
    x, parts = torch.ones(N), [torch.zeros(N) for _ in range(4)]
    dist.all_reduce(x, group=group)
    dist.all_gather(parts, x, group=group)
    dist.barrier(group=group)
    return [float(part.sum()) for part in parts], ledger.snapshot()


def test_a_synchronous_call_need_not_give_a_work(ranks4: Pool) -> None:
    for sums, entries in ranks4.run(waited_for):
        assert sums == [4.0 * N] * 4
        assert [call.op for call in entries] == ["all_reduce", "all_gather", "barrier"]
        assert all(total.calls == 1 and total.seconds > 0 for total in entries.values())


def test_a_call_is_entered_once_whatever_the_backend(ranks4: Pool) -> None:
    for backend in ("thinwire", "gloo"):
        for total, entries in ranks4.run(through_the_seam, backend):
            assert total == 4 * N and len(entries) == 1
            call, entered = entries[0]
            assert call == Call(label="bucket 0", axis="world", op="all_reduce", world_size=4, message_bytes=4 * N)
            assert (entered.calls, entered.wire_bytes) == (1, 6 * N)


def swapped(context: Rank, backend: str) -> tuple[float, dict[Call, int]]:
    group = dist.group.WORLD if backend == "thinwire" else dist.new_group(backend=backend)
    theirs = swap(torch.full((N,), float(context.rank)), context.rank ^ 2, group, context.ledger, "pair")
    return float(theirs.mean()), {call: total.wire_bytes for call, total in context.recorded().items() if call.op == "send"}


def test_two_swap_and_each_send_is_entered_once_whatever_the_backend(ranks4: Pool) -> None:
    for backend in ("thinwire", "gloo"):
        for rank, (got, sends) in enumerate(ranks4.run(swapped, backend)):
            assert got == rank ^ 2
            assert sends == {Call(label="pair", axis="world", op="send", world_size=4, message_bytes=4 * N): 4 * N}


def begun_as_one(context: Rank) -> tuple[float, dict[tuple[str, str], int]]:
    """In a metered group over messages that begin as one or not at all, as NCCL's."""
    register(context.ledger, "tagless", lambda options, place: (Tagless(workless(options, place)), None))
    group = dist.new_group(backend="tagless")
    group.coalesces = True
    theirs = swap(torch.full((N,), float(context.rank)), context.rank ^ 1, group, context.ledger, "pair")
    sent = {(call.label, call.op): total.wire_bytes for call, total in context.recorded().items() if total.seconds > 0}
    return float(theirs.mean()), sent


def test_messages_that_wait_for_each_other_begin_as_one_where_they_must(ranks2: Pool) -> None:
    for rank, (got, sent) in enumerate(ranks2.run(begun_as_one)):
        assert got == rank ^ 1 and sent == {("pair", "send"): 4 * N, ("pair", "recv"): 0}


def between_two(context: Rank, backend: str) -> tuple[list[float], dict[tuple[str, str, int], int]]:
    group = dist.group.WORLD if backend == "thinwire" else dist.new_group(backend=backend)
    own, rows = torch.full((N,), float(context.rank)), torch.arange(2.0).repeat_interleave(N) + 10 * context.rank
    gathered, taken = torch.empty(2 * N), torch.empty(2 * N)
    all_gather(gathered, own, group, context.ledger, "weights").wait()
    all_to_all(taken, rows, group, context.ledger, "gradients").wait()
    all_gather(own[:0], own[:0], group, context.ledger, "nothing").wait()
    entered = {(call.label, call.op, call.message_bytes): total.wire_bytes for call, total in context.recorded().items()}
    return torch.cat([gathered, taken]).view(4, N).mean(1).tolist(), entered


def test_two_ranks_exchange_the_same_whatever_the_backend(ranks2: Pool) -> None:
    """By send and receive; entered as what was asked for."""
    for backend in ("thinwire", "gloo"):
        for rank, (means, entered) in enumerate(ranks2.run(between_two, backend)):
            assert means == [0, 1, rank, 10 + rank]
            assert entered == {
                ("weights", "all_gather", 4 * N): 4 * N,
                ("gradients", "all_to_all", 8 * N): 4 * N,
                ("nothing", "all_gather", 0): 0,
            }


def between_all(context: Rank, backend: str) -> tuple[list[float], list[tuple[Call, Total]]]:
    group = dist.group.WORLD if backend == "thinwire" else dist.new_group(backend=backend)
    rows, taken = torch.arange(4.0).repeat_interleave(N).view(4, N) + 10 * context.rank, torch.empty(4, N)
    works = [all_to_all(taken, rows, group, context.ledger, "gradients") for _ in range(3)]
    for work in reversed(works):
        work.wait()
    return taken.mean(1).tolist(), list(context.recorded().items())


def test_all_to_all_is_the_same_whatever_the_backend(ranks4: Pool) -> None:
    """Several at once, waited for in any order."""
    for backend in ("thinwire", "gloo"):
        for rank, (means, entries) in enumerate(ranks4.run(between_all, backend)):
            assert means == [10 * other + rank for other in range(4)]
            ((call, entered),) = entries
            assert call == Call(label="gradients", axis="world", op="all_to_all", world_size=4, message_bytes=16 * N)
            assert (entered.calls, entered.wire_bytes) == (3, 3 * 12 * N) and entered.seconds > 0
