"""`thinwire lab check`: what this kernel can do, one ability a line, and what follows from it."""

import os
from dataclasses import dataclass

from thinwire.lab.kernel import PACKAGES, Kernel, examine, version


@dataclass(frozen=True, slots=True)
class Ability:
    """One thing that a lab uses: is it here, what was seen, and what follows."""

    name: str
    available: bool
    needed: bool
    follows: str


_KERNEL_ABILITIES = {
    "netns": (True, "a host is a network namespace", "no hosts"),
    "tmpfs": (True, "a host has its own /run and /dev/shm", "no hosts"),
    "veth": (True, "a link is a pair of cards", "no links"),
    "bridge": (True, "a switch is a bridge", "no switches"),
    "tbf": (True, "links have a bandwidth", "no bandwidths"),
    "cubic": (True, "TCP behaves alike on every machine", "TCP would follow the kernel's default"),
    "htb": (False, "not used by the lab", "not used by the lab"),
    "netem": (False, "latencies above 100 us are applied", "latencies above 1 ms are refused unless --no-delay is given"),
}


def available() -> str | None:
    """None where a lab can be built here, else the reason in one line. Takes about 0.1 s."""
    return examine().reason


def check(kernel: Kernel | None = None) -> tuple[Ability, ...]:
    """Every ability of this machine that matters to the lab; it can be built if all `needed` ones are available."""
    kernel = kernel or examine()
    rows = [Ability(name, name in kernel.tools, True, _tool_follows(kernel, name, package)) for name, package in PACKAGES.items()]
    rootless = "--map-root-user" in kernel.unshare
    how = "with a user namespace" if rootless else "as root, without a user namespace"
    reason = kernel.reason or ""
    rows.append(Ability("namespaces", bool(kernel.unshare), True, how if kernel.unshare else reason))
    for name, (needed, then, otherwise) in _KERNEL_ABILITIES.items():
        rows.append(Ability(name, kernel.has(name), needed, then if kernel.has(name) else otherwise))
    cores = os.cpu_count() or 1
    rows.append(Ability("cores", True, False, f"{cores}: about {cores / 2:g} Gbit/s over all links together"))
    return tuple(rows)


def _tool_follows(kernel: Kernel, name: str, package: str) -> str:
    if name not in kernel.tools:
        return f"install the package {package}"
    return version(kernel.tools[name])
