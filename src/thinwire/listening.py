"""Sockets that listen at one address of this machine and at no other, and which address that is.

A store is named by `host`, by which other hosts dial it. On its own machine that name says little: Debian resolves a machine's
name to 127.0.1.1, and behind address translation the name is another machine's. What is bound there:

    one that is said       exactly that; 0.0.0.0 is all of IPv4, :: all of IPv6
    loopback               if nobody is elsewhere, or `host` is an address of loopback
    the address of `host`  if it is this machine's, and others can reach it
    the card's             that of GLOO_SOCKET_IFNAME, or of the only card that is up
    where somebody calls   of several cards; each is listened at until the first call comes
"""

import ipaddress
import select
import socket
import struct
from contextlib import suppress
from pathlib import Path

from thinwire.errors import UserError

BACKLOG = 128
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""All addresses, and how this machine itself dials who listens there."""
LOOPBACK = "127.0.0.1"

_GET_FLAGS, _GET_ADDRESS = 0x8913, 0x8915
_UP, _LOOPBACK, _RUNNING = 0x1, 0x8, 0x40
"""Of Linux's netdevice(7)."""


def parse_address(address: str, what: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[host]:port". what: the option, for the UserError."""
    host, colon, port = address.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UserError(f"{what} {address!r}: write host:port, and [address]:port for IPv6")
    return host, int(port)


def shown(host: str, port: int) -> str:
    """As `parse_address` reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int, what: str) -> socket.socket:
    """A socket that listens there and nowhere else; port 0: one that is free. Of a name's addresses IPv4 comes first.

    what: as the user wrote it, for the UserError if it cannot be.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{what}: {host} is no address of this machine ({error}); take one of `ip address`") from None
    family, kind, protocol, _, place = min(found, key=lambda one: one[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise UserError(f"{what}: {error.strerror or error}; take another port, or an address of this machine") from None
    return sock


def listen_where_called(addresses: list[str], port: int, limit_s: float) -> socket.socket:
    """Listens at each address until somebody calls at one, and from then on there alone; the call is not lost.

    UserError if nobody does.
    """
    socks = [listen(address, port, shown(address, port)) for address in addresses]
    called, _, _ = select.select(socks, [], [], limit_s)
    for sock in socks:
        if sock not in called[:1]:
            sock.close()
    if not called:
        where = " or ".join(shown(address, port) for address in addresses)
        raise UserError(f"no other host has called at {where} for {limit_s:g} s; check that they can reach one of these")
    return called[0]


def way_to(host: str, port: int) -> tuple[str, str] | None:
    """The address from which this machine would send to `host`, and the one to which; None if there is no way. Sends nothing."""
    with suppress(OSError, UnicodeError):
        for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as sock:
                sock.connect(place)
                return str(sock.getsockname()[0]), str(place[0])
    return None


def is_loopback(address: str) -> bool:
    """Also where it is an IPv4 address in the form of IPv6."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def means_loopback(host: str) -> bool:
    """Whether `host` is loopback on every machine: "localhost" or such an address, and not a name that is so here."""
    try:
        return is_loopback(host)
    except ValueError:
        return host == "localhost"


def own_addresses(host: str, card: str = "") -> list[str]:
    """Where this machine, which others dial as `host`, may be reached by them: one if that is known, else one of each card that
    is up. card: to be taken where `host` says nothing."""
    way = way_to(host, 0)
    if way is not None and way[0] == way[1] and not is_loopback(way[0]):  # what is sent to an address of its own stays here
        return [way[0]]
    known = _cards()
    return [known[card]] if card in known else list(known.values())


def _cards() -> dict[str, str]:
    """Address by card, of those that are up with somebody at the other end; IPv4 where a card has one. Empty beyond Linux."""
    with suppress(ImportError, OSError):
        import fcntl

        found = {}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name[:15].encode())
                with suppress(OSError):
                    (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, _GET_FLAGS, request), 16)
                    if flags & (_UP | _RUNNING | _LOOPBACK) != _UP | _RUNNING:
                        continue
                    address = _ipv6_of(name)
                    with suppress(OSError):  # it has no IPv4
                        address = socket.inet_ntoa(fcntl.ioctl(sock, _GET_ADDRESS, request)[20:24])
                    if address:
                        found[name] = address
        return found
    return {}


def _ipv6_of(card: str) -> str:
    """Its first address that is not of the link alone; "" if it has none."""
    lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").split("\n") if Path("/proc/net/if_inet6").exists() else []
    for fields in filter(None, map(str.split, lines)):
        if fields[5] == card and fields[3] == "00":
            return str(ipaddress.IPv6Address(int(fields[0], 16)))
    return ""
