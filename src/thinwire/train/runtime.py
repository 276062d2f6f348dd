"""The main thread of a rank: its process group, and what it does when it is asked to stop."""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from thinwire.environment import Place, agent_has_store, lives
from thinwire.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore


class StopRequest:
    """Ctrl-C or SIGTERM: remembered, and acted upon by all ranks together at the next report. A second one is ignored."""

    requested = False

    def listen(self) -> None:
        """Only from the main thread of a rank."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: setattr(self, "requested", True))


def meet(place: Place, timeout_s: float, bind: str = "") -> "TCPStore":
    """The store of all ranks; rank 0 opens it where its launcher has not. Collective.

    bind: what it listens at, see `open_store`. UserError when the ranks do not find each other.
    """
    import torch.distributed as dist

    from thinwire.collectives.store import open_store

    try:
        return open_store(place, timeout_s, bind, held=agent_has_store())
    except (dist.DistError, RuntimeError, OSError) as error:
        raise _cannot_join(place, error) from None


def share_text(place: Place, store: "TCPStore", name: str, own: str) -> str:
    """`own`, or where it is empty what the lowest rank has that has any; "" if none does. Collective."""
    name = f"{name} {lives()}"
    store.set(f"{name}/{place.rank}", own)
    others = (store.get(f"{name}/{rank}").decode() for rank in range(place.world_size))
    return own or next((text for text in others if text), "")


@contextmanager
def process_group(
    place: Place, backend: str, timeout_s: float, bind: str = "", store: "TCPStore | None" = None
) -> Iterator[Place]:
    """The default process group, from beginning to end; gives the place with the address where the store is. Collective.

    store: of `meet`, if they have met; else `bind` is for it. UserError when the ranks do not find each other.
    """
    import torch.distributed as dist

    from thinwire.collectives.address import plain_gloo

    store = store or meet(place, timeout_s, bind)
    try:
        if backend == "gloo":
            backend = plain_gloo()
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"thinwire {lives()}", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (dist.DistError, RuntimeError, OSError) as error:
        raise _cannot_join(place, error) from None
    try:
        yield replace(place, master_address=store.host, master_port=store.port)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _cannot_join(place: Place, error: BaseException) -> UserError:
    from thinwire.collectives.address import advice

    reason = str(error).splitlines()[0][:200]
    return UserError(
        f"rank {place.rank} on {socket.gethostname()} cannot join {place.world_size} ranks at "
        f"{place.master_address}:{place.master_port}: {reason}; check that the port is free and the address reachable"
        f"{advice(str(error))}"
    )
