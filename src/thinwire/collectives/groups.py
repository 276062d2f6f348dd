"""Process groups of one's own, beside the user's: made with his time-out, and ended when they are not needed any more."""

import contextlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from thinwire.collectives.ledger import Ledger


def private_copy(group: dist.ProcessGroup, description: str, backend: str | None = None) -> dist.ProcessGroup:
    """A new group of the same ranks with the same time-out, on the same backends unless `backend` names another.

    Collective over all ranks, whatever their group: each must make all groups in one order. End it with `release`.

    (torch could let the members of a group make it alone, but it names such a group by its ranks and what each process has made
    before, and members with different pasts then wait for each other for ever.)
    """
    groups: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(groups, (tuple(dist.get_process_group_ranks(group)), timeout_of(group)))
    backend = backend or dist.get_backend_config(group)  # get_backend says "undefined" of a group that was made without a name
    made = {
        ranks: dist.new_group(ranks, timeout=timeout, backend=backend, group_desc=description)
        for ranks, timeout in sorted(dict(groups).items())
    }
    return made[tuple(dist.get_process_group_ranks(group))]


def release(group: dist.ProcessGroup, ledger: Ledger | None = None) -> None:
    """End a group: its threads and connections go when nobody holds it any more. Local; nothing of it may be under way.

    ledger: which was told the group's axis, and may forget it.
    """
    if ledger is not None:
        ledger.axes.pop(group.group_name, None)
    with contextlib.suppress(ValueError):  # whoever destroyed the default group has destroyed all
        dist.destroy_process_group(group)


def backend_of(group: dist.ProcessGroup, device_type: str) -> str | None:
    """Name of the backend that serves tensors on `device_type` ("cpu", "cuda") in `group`; None if none does."""
    served = dict(part.split(":", 1) for part in dist.get_backend_config(group).split(","))
    return served.get(device_type)


def timeout_of(group: Any) -> timedelta:
    """How long a call on `group` may take: of its slowest device, if it has several."""
    own = getattr(group, "timeout", None)
    if isinstance(own, timedelta):
        return own
    if hasattr(group, "options"):
        found: timedelta = group.options._timeout
        return found
    known = (group._get_backend(device).options for device in group._device_types)
    return max((options._timeout for options in known if options is not None), default=default_pg_timeout)


def inherited(timeout: timedelta) -> timedelta:
    """The time-out of a group that c10d is about to make: the default group's, where nobody has named one.

    c10d then says its own 30 minutes, also for the sub-groups of a mesh, whatever the user gave to init_process_group.
    """
    if timeout != default_pg_timeout or not dist.is_initialized() or dist.group.WORLD is None:
        return timeout
    return timeout_of(dist.group.WORLD)


def give_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """To a group of torch's own backends that was made without one."""
    for device in group._device_types:
        backend: Any = group._get_backend(torch.device(device))
        if hasattr(backend, "_set_default_timeout"):
            backend._set_default_timeout(timeout)
