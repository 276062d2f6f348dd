"""The store where all ranks, or the agents that start them, meet: torch's TCPStore, at one address of the first rank's machine.

By itself torch's store listens at all addresses. It takes a socket that listens already, so it gets one from `listening`, where
it is said which address that is.
"""

import socket
import sys
from datetime import timedelta

import torch.distributed as dist

from thinwire.environment import Place, gloo_card
from thinwire.errors import UserError
from thinwire.listening import (
    ANYWHERE,
    LOOPBACK,
    is_loopback,
    listen,
    listen_where_called,
    means_loopback,
    own_addresses,
    shown,
    way_to,
)


def open_store(place: Place, timeout_s: float, bind: str = "", *, held: bool = False) -> dist.TCPStore:
    """Rank 0 opens it, the others come to it. Collective; its `host` and `port` are where this rank dials it.

    bind: the address that rank 0 listens at, the same on all ranks; "": as `listening` says. held: somebody else has opened it at
    the address of `place`. UserError for an address that this machine has not, or if the port is taken.
    """
    address, several, timeout = place.master_address, _several(place), timedelta(seconds=timeout_s)
    if held and bind:
        raise UserError(f"--bind {bind}: whoever started the ranks has opened the store already; leave --bind out")
    if held:
        return dist.TCPStore(address, place.master_port, place.world_size, timeout=timeout)
    if place.rank != 0:
        return dist.TCPStore(_dialled(address, bind, several), place.master_port, place.world_size, timeout=timeout)
    sock = _listener(place, timeout_s, bind, several)
    own, port = sock.getsockname()[:2]
    return dist.TCPStore(
        ANYWHERE.get(own, own),
        port,
        place.world_size,
        is_master=True,
        timeout=timeout,
        master_listen_fd=sock.detach(),
    )


def _several(place: Place) -> bool:
    """Whether ranks are on other hosts, as far as is known."""
    return not means_loopback(place.master_address) and place.local_size != place.world_size


def _dialled(address: str, bind: str, several: bool) -> str:
    """Where another rank than the first finds the store. On its own machine `address` may not be what is bound."""
    if several and not ((way := way_to(address, 0)) and is_loopback(way[0])):
        return address
    if bind:
        return ANYWHERE.get(bind, bind)
    if not several:
        return address if means_loopback(address) else LOOPBACK
    known = own_addresses(address, gloo_card())
    return known[0] if len(known) == 1 else address


def _listener(place: Place, timeout_s: float, bind: str, several: bool) -> socket.socket:
    address, port = place.master_address, place.master_port
    if bind:
        return listen(bind, port, f"--bind {bind}, port {port}")
    known = own_addresses(address, gloo_card()) if several else [_dialled(address, "", several)]
    if len(known) > 1 and place.local_size == 1:  # nobody on this machine dials it
        return listen_where_called(known, port, timeout_s)
    if len(known) != 1:
        cards = f"has the addresses {' and '.join(known)}" if known else "does not say which addresses it has"
        print(
            f"thinwire: {address} is no address here that others reach, and this machine {cards}: the store listens at all of "
            f"IPv4, port {port}; --bind ADDRESS says where",
            file=sys.stderr,
            flush=True,
        )
        known = ["0.0.0.0"]
    return listen(known[0], port, f"rank 0 cannot open the store at {shown(known[0], port)}")
