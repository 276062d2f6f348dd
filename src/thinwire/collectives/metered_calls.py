"""Collectives that our own hooks issue, entered in the ledger under a label, whatever the backend.

The metered backend enters its calls itself; those over any other (NCCL on CUDA) are entered here.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from thinwire.collectives.backend import ALL_GATHER, ASKED_TAG, MOST_ASKED, MeteredGroup, WaitedWork, asked_first, bytes_of
from thinwire.collectives.clock import clock_of
from thinwire.collectives.groups import backend_of
from thinwire.collectives.ledger import Group, Ledger, axis_of


def all_reduce(
    tensor: torch.Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> dist.Work:
    """Sum `tensor` over `group` in place, asynchronously. Collective: every rank of the group, in the same order."""
    issue = partial(dist.all_reduce, tensor, op, group=group, async_op=True)
    return _issued("all_reduce", tensor, group, ledger, label, issue)


def all_gather(output: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str) -> dist.Work:
    """The `own` of all ranks of `group`, in their order, into `output`, asynchronously. Collective as `all_reduce`."""
    if own.numel() and group.size() == 2 and _asks(group, own):  # of more ranks it is a ring
        mine, theirs = group.rank(), 1 - group.rank()
        chunks = output.view(2, own.numel())
        chunks[mine].copy_(own.view(-1))
        issue = _asking_first(group, "all_gather", own, {theirs: chunks[theirs]}, {theirs: own})
    else:
        issue = partial(ALL_GATHER, output, own, group=group, async_op=True)
    return _issued("all_gather", own, group, ledger, label, issue)


def all_to_all(output: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str) -> dist.Work:
    """Row s of `rows` goes to rank s of `group`, and row s of `output` comes from it, asynchronously. Collective as above."""
    if rows.numel() and group.size() > 1 and _asks(group, rows):
        p, mine = group.size(), group.rank()
        taken, given = output.view(p, -1), rows.view(p, -1)
        taken[mine].copy_(given[mine])
        others = [(mine + step) % p for step in range(1, p)]
        theirs, own = ({rank: part[rank] for rank in others} for part in (taken, given))
        issue = _asking_first(group, "all_to_all", rows, theirs, own)
    else:
        issue = partial(dist.all_to_all_single, output, rows, group=group, async_op=True)
    return _issued("all_to_all", rows, group, ledger, label, issue)


def _asks(group: dist.ProcessGroup, message: torch.Tensor) -> bool:
    """Whether messages of gloo's, receives first, are faster than the call. Messages on a device gloo's calls alone take."""
    if message.device.type != "cpu":
        return False
    if isinstance(group, MeteredGroup):
        return group.asks
    return backend_of(group, "cpu") == "gloo" and group.size() <= MOST_ASKED


def _asking_first(
    group: dist.ProcessGroup, op: str, message: torch.Tensor, theirs: dict[int, torch.Tensor], own: dict[int, torch.Tensor]
) -> Callable[[], dist.Work]:
    """See `MeteredGroup.asking_first`."""
    if isinstance(group, MeteredGroup):
        return partial(group.asking_first, op, message, theirs, own)
    receive = [partial(dist.irecv, one, group=group, group_src=peer, tag=ASKED_TAG) for peer, one in theirs.items()]
    send = [partial(dist.isend, one, group=group, group_dst=peer, tag=ASKED_TAG) for peer, one in own.items()]
    return partial(asked_first, receive, send)


def _issued(
    op: str, message: torch.Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str, issue: Callable[[], dist.Work]
) -> dist.Work:
    clock = clock_of(message.device)
    with ledger.label(label):
        issued = clock.now()
        total = None if isinstance(group, MeteredGroup) else ledger.enter(op, bytes_of(message), _group(group))
        work = issue()
    if total is not None:
        done = partial(ledger.completed, total, clock, issued)
        if isinstance(work, WaitedWork):
            return WaitedWork([work], done)
        work.get_future().add_done_callback(done)
    return work


def together(messages: Sequence[dist.P2POp]) -> list[dist.Work]:
    """Begin sends and receives of one group, each of which may wait for another one's."""
    group = messages[0].group
    return group.together(messages) if isinstance(group, MeteredGroup) else dist.batch_isend_irecv(list(messages))


def swap(tensor: torch.Tensor, peer: int, group: dist.ProcessGroup, ledger: Ledger, label: str) -> torch.Tensor:
    """Send `tensor` to rank `peer` of `group` and return the peer's, of the same shape. Both call. Waits for the network.

    Both directions are begun before either is waited for, so that nobody must go first.
    """
    theirs = torch.empty_like(tensor)
    clock = clock_of(tensor.device)
    with ledger.label(label):
        issued = clock.now()
        total = None if isinstance(group, MeteredGroup) else ledger.enter("send", bytes_of(tensor), _group(group))
        calls = [  # the receive first, as in `MeteredGroup.asking_first`
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
            dist.P2POp(dist.isend, tensor, group=group, group_peer=peer),
        ]
        for work in together(calls):
            work.wait()
    if total is not None:
        ledger.completed(total, clock, issued)
    return theirs


def _group(group: dist.ProcessGroup) -> Group:
    return Group(group.group_name, group.rank(), group.size(), axis_of(group.group_desc))
