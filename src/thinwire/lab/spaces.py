"""Namespaces of a host: enter, leave, make. Thin calls into libc; only process 1 of a lab uses them."""

import ctypes
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
MS_BIND = 4096
SIOCGIFFLAGS = 0x8913
IFF_RUNNING = 0x40

_libc = ctypes.CDLL(None, use_errno=True)


class Space(NamedTuple):
    """Descriptors of the open namespaces of one host. Any process that enters them is on that host."""

    net: int
    mount: int
    uts: int
    ipc: int

    def enter(self) -> None:
        """Move the calling (single-threaded) process onto the host. Its working directory is then `/`."""
        for descriptor, kind in zip(self, (CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC), strict=True):
            _call("setns", descriptor, kind)


def mount(source: str, target: str, kind: str, flags: int = 0) -> None:
    """mount(2). Raises OSError naming the target."""
    if _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def make_space(netns: str, hostname: str, binds: Mapping[str, str]) -> Space:
    """Give the network namespace `netns` its own host name, IPC and /dev/shm; they live while they are open.

    binds: what is found at a path on this host, as the path of it here.

    A short-lived child makes them, since a process cannot leave a mount namespace that it has changed for another host.
    """
    net = os.open(f"/run/netns/{netns}", os.O_RDONLY | os.O_CLOEXEC)
    ready, reply = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _call("setns", net, CLONE_NEWNET)
            _call("unshare", CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC)
            socket.sethostname(hostname[:64])
            mount("tmpfs", "/dev/shm", "tmpfs")
            for there, here in binds.items():
                mount(here, there, "", MS_BIND)
            os.write(reply, b"+")
            signal.pause()
        except OSError as error:
            os.write(reply, str(error).encode())
        os._exit(1)
    os.close(reply)
    try:
        answer = os.read(ready, 4096)
        if answer != b"+":
            raise OSError(f"{hostname}: {answer.decode()}")
        mount_space, uts, ipc = (os.open(f"/proc/{child}/ns/{n}", os.O_RDONLY | os.O_CLOEXEC) for n in ("mnt", "uts", "ipc"))
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return Space(net, mount_space, uts, ipc)


@contextmanager
def network(netns: str | None) -> Iterator[None]:
    """Be in the network of a host (None: stay in the core) for the duration of a `with`."""
    if netns is None:
        yield
        return
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/run/netns/{netns}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", there, CLONE_NEWNET)
        yield
    finally:
        _call("setns", home, CLONE_NEWNET)
        os.close(there)
        os.close(home)


def counters(netns: str) -> dict[str, tuple[int, int]]:
    """Bytes (sent, received) of every card of a host, as its kernel counts them: whole frames."""
    with network(netns):
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
    fields = {name.strip(): values.split() for name, values in (line.split(":", 1) for line in lines)}
    return {name: (int(values[8]), int(values[0])) for name, values in fields.items() if name != "lo"}


def retransmitted(netns: str) -> int:
    """TCP segments that a host has sent once more since its network was made (RFC 4022, tcpRetransSegs)."""
    with network(netns):
        lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(values[names.index("RetransSegs")])


def announce(netns: str, interfaces: list[str]) -> None:
    """Send one broadcast frame from each card, so that every bridge knows where it is and never floods."""
    with network(netns):
        for interface in interfaces:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
                sender.sendto(struct.pack("!H", 0), ("255.255.255.255", 9))


def is_up(interface: str) -> bool:
    """Does the card of the current network see the other end of its cable?"""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        answer = fcntl.ioctl(query, SIOCGIFFLAGS, struct.pack("16sh22x", interface.encode(), 0))
    return bool(struct.unpack("16sh22x", answer)[1] & IFF_RUNNING)


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
