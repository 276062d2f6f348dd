"""Process 1 of a lab: builds the network, runs the commands, counts the cards. `python -m thinwire.lab.inside ORDERS FD`.

It is the first process of its PID namespace, so when it ends, for whatever reason, the kernel ends all the others and
frees every namespace, card and mount. It reads its orders from the JSON file ORDERS and signals from stdin (one byte each;
end of file: end at once), and writes one JSON object to the descriptor FD.
"""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from thinwire.lab import spaces
from thinwire.lab.enter import write_spaces
from thinwire.lab.watch import Running, Watch

ROOT = Path("/run/thinwire")
RESULTS = ROOT / "results"
HERE = ROOT / "host"
"""On each host its own folder."""
CARRIER_TIMEOUT_S = 5.0


def main() -> None:
    """Read the orders, build, run, answer."""
    orders, report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2])
    os.set_inheritable(report, False)
    try:
        answer = run(orders)
    except (OSError, subprocess.SubprocessError) as error:
        answer = {"error": f"the lab could not be built: {error}"}
    with os.fdopen(report, "w", encoding="utf-8") as stream:
        json.dump(answer, stream)
    os._exit(0)


def run(orders: dict[str, Any]) -> dict[str, Any]:
    """Build, run and count, as ordered; the answer goes back as JSON."""
    hosts: dict[str, dict[str, Any]] = orders["hosts"]
    spaces.mount("tmpfs", "/run", "tmpfs")
    RESULTS.mkdir(parents=True)
    HERE.mkdir()
    for name, text in orders["files"].items():
        (ROOT / name).write_text(text, encoding="utf-8")
    for step in orders["steps"]:
        apply(step, orders["tools"])
    homes = {name: _settle(name, host) for name, host in hosts.items()}
    write_spaces(ROOT, homes)
    for host in hosts.values():
        _wait_for_carrier(host["netns"], host["interfaces"])
        spaces.announce(host["netns"], host["interfaces"])
    time.sleep(0.01)
    before = {name: spaces.counters(host["netns"]) for name, host in hosts.items()}
    processes = [Running(spec, homes[spec["host"]], orders["cwd"]) for spec in orders["processes"]]
    watch = Watch(processes, control=0, notice_s=orders["notice_s"], grace_s=orders["grace_s"])
    stalls = [(step["at_s"], partial(_stall, step, orders["tools"])) for step in orders["stalls"]]
    seconds = watch.run(stalls, RESULTS / orders["begins"] if orders["begins"] else None)
    after = {name: spaces.counters(host["netns"]) for name, host in hosts.items()}
    return {
        "seconds": seconds,
        "processes": [{"host": p.host, "code": p.code, "last_line": p.last_line()} for p in processes],
        "failures": [processes.index(failed) for failed in watch.failures],
        "signal": watch.signal,
        "counters": {
            name: {card: [now - then for now, then in zip(after[name][card], before[name][card], strict=True)] for card in cards}
            for name, cards in before.items()
        },
        "retransmitted": {name: spaces.retransmitted(host["netns"]) for name, host in hosts.items()},
        "results": {
            path.name: path.read_text(encoding="utf-8", errors="replace") for path in sorted(RESULTS.iterdir()) if path.is_file()
        },
    }


def apply(step: dict[str, Any], tools: dict[str, str]) -> None:
    """Run one step of the wiring with a single process. OSError with the tool's message."""
    netns, lines = step["netns"], step["lines"]
    if step["tool"] == "sysctl":
        with spaces.network(netns):
            for line in lines:
                name, value = line.split("=")
                path = Path("/proc/sys") / name
                if path.exists():
                    path.write_text(value)
        return
    argv = [tools[step["tool"]], *(["-n", netns] if netns else []), "-batch", "-"]
    done = subprocess.run(argv, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise OSError(f"{step['tool']} {netns or 'core'}: {' '.join(done.stderr.split())}")


def _stall(step: dict[str, Any], tools: dict[str, str]) -> None:
    apply({"tool": "ip", "netns": None, "lines": step["lines"]}, tools)
    os.write(2, f"thinwire: lab: {step['message']}\n".encode())


def _settle(name: str, host: dict[str, Any]) -> spaces.Space:
    folder = ROOT / host["netns"]
    folder.mkdir()
    (folder / "hosts").write_text(host["hosts_file"], encoding="utf-8")
    (folder / "lab.json").write_text(json.dumps(host["lab"]), encoding="utf-8")
    return spaces.make_space(host["netns"], name, {"/etc/hosts": f"{folder}/hosts", str(HERE): str(folder), **host["binds"]})


def _wait_for_carrier(netns: str, interfaces: list[str]) -> None:
    """A new cable needs a moment until the kernel calls it up."""
    deadline = time.monotonic() + CARRIER_TIMEOUT_S
    with spaces.network(netns):
        while not all(spaces.is_up(interface) for interface in interfaces):
            if time.monotonic() > deadline:
                raise OSError(f"the cards of {netns} did not come up within {CARRIER_TIMEOUT_S:g} s")
            time.sleep(0.005)


if __name__ == "__main__":
    main()
