"""What was sent over an axis, and what was predicted, in one form."""

from collections.abc import Iterable

import torch.distributed as dist

from thinwire.collectives.ledger import Snapshot
from thinwire.collectives.wire import sent_bytes
from thinwire.traffic import Transfer


def sent_over(axis: str, snapshot: Snapshot) -> dict:
    return {
        (call.label, call.op, call.message_bytes): (total.calls, total.wire_bytes)
        for call, total in snapshot.items()
        if call.axis == axis
    }


def priced(transfers: Iterable[Transfer], group: dist.ProcessGroup) -> dict:
    """Calls and bytes on the wire, as `sent_over`."""
    found: dict[tuple[str, str, int], tuple[int, int]] = {}
    for one in transfers:
        key = one.label, one.op, one.message_bytes
        calls, wire_bytes = found.get(key, (0, 0))
        wire = one.calls * sent_bytes(one.op, one.message_bytes, group.size(), group.rank())
        found[key] = calls + one.calls, wire_bytes + wire
    return found
