"""Where servers listen and workers dial: "host:port", with an IPv6 address in brackets.

A server binds exactly the address it was given and no other; a worker dials exactly what it was given. Neither tells the other
any address, so none has to be guessed: a name that a host knows as 127.0.1.1 is served on 127.0.1.1, and is printed as that.
"""

import ipaddress
import socket

from thinwire.errors import UserError

BACKLOG = 128


def parse(address: str, what: str) -> tuple[str, int]:
    """Host and port. what: the option, for the UserError."""
    host, colon, port = address.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UserError(f"{what} {address!r}: write host:port, and [address]:port for IPv6")
    return host, int(port)


def listen(address: str, what: str) -> socket.socket:
    """A socket that listens there and nowhere else. Of a name's addresses IPv4 comes first. UserError if it cannot be."""
    host, port = parse(address, what)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{what} {address}: {host} is no address of this machine ({error}); take one of `ip address`") from None
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
        raise UserError(
            f"{what} {address}: {error.strerror or error}; take another port, or an address of this machine"
        ) from None
    return sock


def shown(sock: socket.socket) -> str:
    """Where it listens, as workers write it."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"


def is_loopback(sock: socket.socket) -> bool:
    """Nobody outside of this machine can reach it."""
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback
