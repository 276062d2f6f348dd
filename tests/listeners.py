"""The addresses at which processes listen, from /proc: what a test compares with what was said."""

import ipaddress
import sys
from contextlib import suppress
from pathlib import Path

LISTENS = "0A"


def of_network() -> dict[int, str]:
    """Address by inode, of all TCP sockets that listen in this network namespace."""
    found = {}
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for fields in map(str.split, table.read_text().splitlines()[1:] if table.exists() else ()):
            if fields[3] == LISTENS:
                found[int(fields[9])] = _address(fields[1].partition(":")[0])
    return found


def of_process(pid: int) -> dict[int, str]:
    """Address by inode, of those that this process holds; none of one that has ended."""
    links = []
    with suppress(OSError):  # it has ended
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed by now, as the one by which this was read
                links.append(str(entry.readlink()))
    listening, inodes = of_network(), [int(link[8:-1]) for link in links if link.startswith("socket:[")]
    return {inode: listening[inode] for inode in inodes if inode in listening}


def of_processes(pids: list[int]) -> set[str]:
    """Addresses at which one of these processes listens."""
    return {address for pid in pids for address in of_process(pid).values()}


def _address(text: str) -> str:
    """From the kernel's words of 32 bits, each in the order of the machine."""
    words = [text[first : first + 8] for first in range(0, len(text), 8)]
    packed = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    return str(ipaddress.ip_address(packed))
