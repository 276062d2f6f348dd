"""How much memory is free here: of the machine, or of the control groups of this process if they allow less. No torch."""

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Free:
    """bytes: free for new processes. pool: the same text in all processes that share them."""

    bytes: float
    pool: str


def free_memory(root: Path = Path("/")) -> Free | None:
    """None where the system does not say. root: of the file system that says it."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
        machine = (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    if found is None:
        return None
    of_machine = 1024.0 * int(found.group(1))
    of_group = min((limit - used for limit, used in _groups(root)), default=of_machine)
    if of_group < of_machine:
        return Free(max(0.0, of_group), f"{machine} {socket.gethostname()}")  # a container has a group and a name
    return Free(of_machine, machine)


def total_memory(root: Path = Path("/")) -> float:
    """Bytes of the machine, or what its control groups allow."""
    return min([float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), *(limit for limit, _ in _groups(root))])


def has_gpu() -> bool:
    """Whether there is a driver for one, so that torch may put models elsewhere than into the machine's memory."""
    return any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "kfd"))  # CUDA's, ROCm's


def _groups(root: Path) -> Iterator[tuple[float, float]]:
    """Limit and use of this process's control group and of all that it is in, where there is a limit; both versions of them."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = top / path.strip("/")
        for folder in [own, *own.parents] if own.is_relative_to(top) else [top]:
            if folder == top.parent:
                break
            try:
                limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in names[:2])
                stat = (folder / "memory.stat").read_text(encoding="ascii")
            except OSError:
                continue
            if limit.isdigit():
                cached = re.search(rf"^{names[2]} (\d+)$", stat, re.MULTILINE)  # which the kernel gives back when asked
                yield float(limit), float(used) - (int(cached.group(1)) if cached else 0)


@dataclass(frozen=True)
class Room:
    """Where ranks share memory: `ranks` of them; name: of a host or a device."""

    name: str
    ranks: int
    free_bytes: float


def rooms(ranks: list[tuple[str, Free | None]]) -> list[Room]:
    """From the name and what is free, as each rank sees it; without those that do not say."""
    pools: dict[str, list[tuple[str, float]]] = {}
    for name, free in ranks:
        if free is not None:
            pools.setdefault(free.pool, []).append((name, free.bytes))
    found = []
    for known in pools.values():
        names = list(dict.fromkeys(name for name, _ in known))
        name = names[0] if len(names) == 1 else f"the machine of {', '.join(names[:3])}{', ..' if len(names) > 3 else ''}"
        found.append(Room(name, len(known), min(size for _, size in known)))
    return found
