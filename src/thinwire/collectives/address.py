"""The address at which other ranks reach this one: that of the card that leads to the host of the store, where all ranks meet.

gloo offers the others what this machine's own name resolves to. Debian and Ubuntu resolve that to 127.0.1.1, and on machines with
several cards, a VPN or a bridge for containers it may be any of them. But every rank has reached the store, so:

    on another host      the address from which this rank sends to the store's host; it says in the store to which one it sends
    on the store's host  where the way to the store is loopback, what another rank has said; loopback if no rank is elsewhere

GLOO_SOCKET_IFNAME, where it is set, names the card instead.
"""
# torch's type stubs do not know the options and devices of its gloo group:
# mypy: disable-error-code="attr-defined"

import re
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from thinwire.collectives.groups import inherited, timeout_of
from thinwire.environment import gloo_card
from thinwire.errors import UserError
from thinwire.listening import is_loopback, way_to

POLL_S = 0.005
THREADS = 2
"""Of each group, as gloo has by itself."""
SAID, HERE = "address of the store's host", "ranks on the store's host"


class GlooDevices:
    """gloo's devices of this process: the sockets at one address, and a thread that looks after them all.

    A group that makes its own has a thread of its own, which wakes up a hundred times a second as long as the group lives: with
    twenty groups a fortieth of a core for nothing.
    """

    def __init__(self) -> None:
        self._by_place: dict[tuple[str, str], Any] = {}

    def group(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
        """A group, each rank at the address where the others reach it. Collective over its ranks."""
        card = gloo_card()
        address = None if card else own_address(store, size, timeout)
        if "," in card or not (card or address):  # several cards, or a store on no network: gloo's own choice
            return dist.ProcessGroupGloo(store, rank, size, timeout)
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [self._device(card, address or "")], THREADS, timeout
        return dist.ProcessGroupGloo(store, rank, size, options)

    def _device(self, card: str, address: str) -> Any:
        if (card, address) not in self._by_place:
            where = {"interface": card} if card else {"hostname": address}
            self._by_place[card, address] = dist.ProcessGroupGloo.create_device(**where)
        return self._by_place[card, address]


def plain_gloo() -> str:
    """The name of a backend that is gloo itself, at the address where others reach this rank. Call before init_process_group."""
    devices, name = GlooDevices(), "gloo_reached"

    def create(options: Any, _backend_options: Any = None) -> dist.ProcessGroupGloo:
        return devices.group(options.store, options.group_rank, options.group_size, inherited(options.timeout))

    dist.Backend.register_backend(name, create, extended_api=True, devices=["cpu"])
    return name


def own_address(store: dist.Store, size: int, timeout: timedelta) -> str | None:
    """Where others reach this rank; None if the store is not on a network. Collective over the `size` ranks that use `store`."""
    place = _place_of(store)
    found = None if place is None else way_to(*place)
    if found is None:
        return None
    own, theirs = found
    if not is_loopback(own):
        store.compare_set(SAID, "", theirs)  # the first that is said is what all read
        return own
    store.add(HERE, 1)
    end_s = time.monotonic() + timeout.total_seconds()
    while not store.check([SAID]):
        if store.add(HERE, 0) == size or time.monotonic() > end_s:  # who is missing fails with gloo's own words
            return own
        time.sleep(POLL_S)
    return store.get(SAID).decode()


def address_of_default_group() -> str:
    """`own_address` of this rank among all. Collective. UserError if they have met in no store on a network."""
    group: Any = dist.group.WORLD
    store = dist.PrefixStore("addresses", dist.distributed_c10d._get_default_store())
    found = own_address(store, group.size(), timeout_of(group))
    if found is None:
        raise UserError("the ranks have met in no store on a network, so it is not known where others reach this one")
    return found


def advice(error: str) -> str:
    """What to do about a connection that failed at an address which is no other machine's; "" for any other error."""
    offered = re.search(r"remote=\[([^\]]+)\]", error)
    if offered is None or not is_loopback(offered[1]):
        return ""
    name = socket.gethostname()
    with suppress(OSError):
        name = f"{name} resolves to {socket.gethostbyname(name)}"
    return (
        f"; a rank offered {offered[1]}, its own machine: here {name} (/etc/hosts); make the group with thinwire.init(), or set "
        f"GLOO_SOCKET_IFNAME on each host to the card that `ip route get` names for another host (now {gloo_card() or 'not set'})"
    )


def _place_of(store: dist.Store) -> tuple[str, int] | None:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, dist.TCPStore) else None
