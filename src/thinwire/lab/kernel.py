"""What this machine can do: are there rights to make namespaces, and does the kernel have what a lab is made of?

Everything is tried for real in namespaces of its own, which are gone when the trial ends (about 0.1 s).
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "setpriv": "util-linux", "env": "coreutils"}
SYSTEM_FOLDERS = "/usr/sbin:/sbin:/usr/bin:/bin"
ISOLATED = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

_TRIAL = """
try() { name=$1; shift; if said=$("$@" 2>&1); then echo "$name yes"; else echo "$name no $said" | tr '\\n' ' '; echo; fi; }
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
    abilities: dict[str, bool] | None = None

    def has(self, ability: str) -> bool:
        return bool(self.abilities and self.abilities.get(ability))


def examine() -> Kernel:
    """Try everything once. `unshare` is then the argv prefix that runs a command in fresh namespaces."""
    if sys.platform != "linux":
        return Kernel(f"the lab needs Linux namespaces; this is {sys.platform}", {})
    tools = {name: path for name in PACKAGES if (path := find(name))}
    for name, package in PACKAGES.items():
        if name not in tools:
            return Kernel(f"the lab needs the program {name!r}; install the package {package}", tools)
    said = ""
    for rights in ((), ("--map-root-user",)) if os.geteuid() == 0 else (("--map-root-user",),):
        prefix = (tools["unshare"], *rights, *ISOLATED)
        trial = _run([*prefix, "sh", "-c", f"IP={tools['ip']} TC={tools['tc']}\n{_TRIAL}"])
        answers = dict(line.split(" ", 1) for line in trial.stdout.splitlines() if " " in line)
        if answers:
            abilities = {name: answer == "yes" for name, answer in answers.items()}
            return Kernel(_missing(answers), tools, prefix, abilities)
        said = said or (trial.stderr.strip().splitlines() or ["no reason given"])[-1]
    return Kernel(
        f"no rights to make namespaces ({said}); run as root, allow user namespaces, or give the container CAP_SYS_ADMIN",
        tools,
    )


def find(tool: str) -> str | None:
    """The path of a program, also where PATH leaves out the folders of the system's own tools."""
    return shutil.which(tool) or shutil.which(tool, path=SYSTEM_FOLDERS)


def version(tool_path: str) -> str:
    """What the program says of itself, e.g. "ip utility, iproute2-6.1.0"."""
    return (_run([tool_path, "-V"]).stdout.strip().splitlines() or ["unknown"])[0]


def _missing(answers: dict[str, str]) -> str | None:
    for name in ("tmpfs", "netns", "veth", "bridge", "attach", "tbf", "cubic"):
        if answers.get(name, "no") != "yes":
            said = answers.get(name, "").removeprefix("no").strip() or "no reason given"
            return f"this kernel or container does not allow what the lab needs: {name} ({said})"
    return None


def _run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 1, "", "no answer within 20 s")
