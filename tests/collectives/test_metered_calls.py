"""The explicit seam enters the same over the metered backend as over any other."""

import torch
import torch.distributed as dist

from pool import Pool, Rank
from thinwire.collectives.ledger import Call, Total
from thinwire.collectives.metered_calls import all_reduce, swap

N = 24


def through_the_seam(context: Rank, backend: str) -> tuple[float, list[tuple[Call, Total]]]:
    group = dist.group.WORLD if backend == "thinwire" else dist.new_group(backend=backend)
    x = torch.ones(N)
    all_reduce(x, group, context.ledger, "bucket 0").wait()
    return float(x.sum()), list(context.recorded().items())


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
