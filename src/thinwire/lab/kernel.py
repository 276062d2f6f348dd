"""What this machine can do: are there rights to make namespaces, and does the kernel have what a lab is made of?

Everything is tried for real in namespaces of its own, which are gone when the trial ends (about 0.1 s). `thinwire lab check`
prints one ability a line, and what follows from it.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "setpriv": "util-linux", "env": "coreutils"}
SYSTEM_FOLDERS = "/usr/sbin:/sbin:/usr/bin:/bin"
ISOLATED = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

_FOLLOWS = {
    "netns": (True, "a host is a network namespace", "no hosts"),
    "tmpfs": (True, "a host has its own /run and /dev/shm", "no hosts"),
    "veth": (True, "a link is a pair of cards", "no links"),
    "bridge": (True, "a switch is a bridge", "no switches"),
    "tbf": (True, "links have a bandwidth", "no bandwidths"),
    "cubic": (True, "TCP behaves alike on every machine", "TCP would follow the kernel's default"),
    "htb": (False, "not used by the lab", "not used by the lab"),
    "netem": (False, "latencies above 100 us are applied", "latencies above 1 ms are refused unless --no-delay is given"),
}
"""Of each ability: is it needed, what follows from it, and what if it is missing."""

_TRIAL = """
try() { name=$1; shift; if why=$("$@" 2>&1); then echo "$name yes"; else echo "$name no $why" | tr '\\n' ' '; echo; fi; }
try tmpfs mount -t tmpfs tmpfs /run
try netns "$IP" netns add trial
try veth "$IP" link add trial0 type veth peer name eth0 netns trial
try bridge "$IP" link add trialbr type bridge
try attach "$IP" link set trial0 master trialbr up
try tbf "$TC" qdisc replace dev trial0 root tbf rate 1mbit burst 16384 latency 200ms
try htb "$TC" qdisc replace dev trial0 root htb
try netem "$TC" qdisc replace dev trial0 root netem delay 1ms
"$IP" -n trial link set eth0 up
"$IP" -n trial address add 10.77.0.1/24 dev eth0 noprefixroute
try cubic "$IP" -n trial route add 10.77.0.0/24 dev eth0 congctl cubic
"""


@dataclass(frozen=True, slots=True)
class Kernel:
    """The outcome of the trial. `reason` is None where a lab can be built, else one line saying why not."""

    reason: str | None
    tools: dict[str, str]
    unshare: tuple[str, ...] = ()
    abilities: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Ability:
    """One thing that a lab uses: is it here, is it needed, and what follows."""

    name: str
    available: bool
    needed: bool
    follows: str


def examine() -> Kernel:
    """Try everything once. `unshare` is then the argv prefix that runs a command in fresh namespaces."""
    if sys.platform != "linux":
        return Kernel(f"the lab needs Linux namespaces; this is {sys.platform}", {})
    tools = {name: path for name in PACKAGES if (path := _find(name))}
    for name, package in PACKAGES.items():
        if name not in tools:
            return Kernel(f"the lab needs the program {name!r}; install the package {package}", tools)
    why = ""
    for rights in ((), ("--map-root-user",)) if os.geteuid() == 0 else (("--map-root-user",),):
        prefix = (tools["unshare"], *rights, *ISOLATED)
        trial = _run([*prefix, "sh", "-c", f"IP={tools['ip']} TC={tools['tc']}\n{_TRIAL}"])
        answers = dict(line.split(" ", 1) for line in trial.stdout.splitlines() if " " in line)
        if answers:
            abilities = frozenset(name for name, answer in answers.items() if answer == "yes")
            return Kernel(_missing(answers), tools, prefix, abilities)
        why = why or (trial.stderr.strip().splitlines() or ["no reason given"])[-1]
    return Kernel(
        f"no rights to make namespaces ({why}); run as root, allow user namespaces, or give the container CAP_SYS_ADMIN",
        tools,
    )


def check(kernel: Kernel) -> tuple[Ability, ...]:
    """Every ability of this machine that matters to the lab; it can be built if all `needed` ones are available."""
    rows = []
    for name, package in PACKAGES.items():
        here = name in kernel.tools
        rows.append(Ability(name, here, True, _version(kernel.tools[name]) if here else f"install the package {package}"))
    rootless = "--map-root-user" in kernel.unshare
    how = "with a user namespace" if rootless else "as root, without a user namespace"
    rows.append(Ability("namespaces", bool(kernel.unshare), True, how if kernel.unshare else kernel.reason or ""))
    for name, (needed, then, otherwise) in _FOLLOWS.items():
        here = name in kernel.abilities
        rows.append(Ability(name, here, needed, then if here else otherwise))
    cores = os.cpu_count() or 1
    rows.append(Ability("cores", True, False, f"{cores}: about {cores / 2:g} Gbit/s over all links together"))
    return tuple(rows)


def _find(tool: str) -> str | None:
    """The path of a program, also where PATH leaves out the folders of the system's own tools."""
    return shutil.which(tool) or shutil.which(tool, path=SYSTEM_FOLDERS)


def _version(tool_path: str) -> str:
    """The program's own words, e.g. "ip utility, iproute2-6.1.0"."""
    return (_run([tool_path, "-V"]).stdout.strip().splitlines() or ["unknown"])[0]


def _missing(answers: dict[str, str]) -> str | None:
    for name in ("tmpfs", "netns", "veth", "bridge", "attach", "tbf", "cubic"):
        if answers.get(name, "no") != "yes":
            why = answers.get(name, "").removeprefix("no").strip() or "no reason given"
            return f"this kernel or container does not allow what the lab needs: {name} ({why})"
    return None


def _run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 1, "", "no answer within 20 s")
