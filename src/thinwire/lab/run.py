"""Run commands on a cluster in a box and wait for them: the supervisor's side.

    this process --orders, signals--> process 1 of the lab --starts--> commands of the hosts
                 <--one JSON answer--

Nothing survives this call. If this process dies, the pipe to the lab closes and `setpriv --pdeathsig` kills `unshare`,
whose --kill-child kills process 1; with process 1 of a PID namespace the kernel kills everything in it and frees the
networks and mounts that only they held.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

from thinwire.cluster import Cluster, dump_cluster
from thinwire.endings import signals_handled
from thinwire.errors import UserError
from thinwire.lab.commands import FIRST_CARD, ROOT, Process, host_files
from thinwire.lab.kernel import Kernel, examine
from thinwire.lab.stalls import Stall, steps_of
from thinwire.lab.wiring import Card as Plug
from thinwire.lab.wiring import Wiring, bridges, imitated, wire
from thinwire.record import Card, Cards, RunFolder

RESULTS = f"{ROOT}/results"
HOST_FILE = f"{ROOT}/host/lab.json"
"""On each host a file of its own at this path; its processes find the path in THINWIRE_LAB."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LEAVE_S = 5.0


@dataclass(frozen=True, slots=True)
class LabOptions:
    """How to run. Without `delay`, latencies are not imitated; `paced` asks trainers to keep the declared compute rates.

    After a failure the other hosts get `notice_s` to notice; after a signal all get `grace_s` to end cleanly.
    `stalls`: links that fall silent for a while. `bare`: hosts as an installation of Debian leaves them: each knows itself as
    127.0.1.1 and has a bridge for containers that leads nowhere, and no variable names the card to use. `disks`: a folder that is
    on each host a disk of its own, DISKS/HOST here.
    """

    delay: bool = True
    paced: bool = True
    notice_s: float = 10.0
    grace_s: float = 30.0
    stalls: tuple[Stall, ...] = ()
    bare: bool = False
    disks: Path | None = None


class LabResult:
    """What came of it. `failure` is one line, None where every command succeeded; `results` are texts that they left.

    `exit_code` is 0 only if all succeeded: else that of the host in `failure`, or 128 + signal where one ended them.
    `retransmitted`: by host, the TCP segments that it sent once more. `delay`: see `Wiring`.
    """

    def __init__(self, wiring: Wiring, answer: dict[str, Any]) -> None:
        """answer: of process 1 of the lab."""
        self.exit_codes: dict[str, int] = {}
        for process in answer["processes"]:
            self.exit_codes[process["host"]] = self.exit_codes.get(process["host"]) or process["code"]
        self.signal: int | None = answer["signal"]
        self.seconds: float = answer["seconds"]
        self.cards = tuple(_counted(card, answer) for card in wiring.cards)
        self.retransmitted: dict[str, int] = answer["retransmitted"]
        self.delay = wiring.delay
        self.results: dict[str, str] = answer["results"]
        failed = _failed(answer)
        self.failure = _failure(answer, failed)
        self.exit_code: int = 128 + answer["signal"] if failed and answer["signal"] else max(1, failed["code"]) if failed else 0
        folder = self.results.get("run_folder", "").strip()
        self.run_folder = Path(folder) if folder else None


def prepare(cluster: Cluster, options: LabOptions) -> tuple[Kernel, Wiring]:
    """Look at this machine and plan the network; UserError where one or the other does not allow it."""
    kernel = examine()
    if kernel.reason:
        raise UserError(kernel.reason)
    return kernel, wire(cluster, netem="netem" in kernel.abilities, delay=options.delay)


def run(cluster: Cluster, commands: Mapping[str, Sequence[str]], options: LabOptions | None = None) -> LabResult:
    """Run one command on each named host; see `launch`."""
    return launch(cluster, [Process(host, tuple(argv)) for host, argv in commands.items()], options)


def launch(
    cluster: Cluster,
    processes: Sequence[Process],
    options: LabOptions | None = None,
    prepared: tuple[Kernel, Wiring] | None = None,
) -> LabResult:
    """Build the lab, run the processes, wait for all, take it down. Output of the first one streams through.

    In the main thread, SIGINT, SIGTERM and SIGHUP are passed on to the processes while they run. Raises UserError where
    the lab cannot be built; a command that fails is no exception, see LabResult.
    """
    options = options or LabOptions()
    names = {host.name for host in cluster.hosts}
    for process in processes:
        if process.host not in names:
            raise UserError(f"{cluster.name} has no host {process.host!r}; known: {', '.join(sorted(names))}")
    if not processes:
        raise UserError("no command was given to run in the lab")
    kernel, wiring = prepared or prepare(cluster, options)
    result = LabResult(wiring, _talk(kernel, _orders(cluster, processes, kernel, wiring, options)))
    if result.run_folder and options.disks and result.run_folder.is_relative_to(options.disks.resolve()):
        result.run_folder = options.disks / processes[0].host / result.run_folder.relative_to(options.disks.resolve())
    if result.run_folder and result.run_folder.is_dir():
        run_folder = RunFolder(result.run_folder)
        run_folder.write("cards.json", Cards(cards=result.cards, ledger_sent_bytes=_ledger_sent_bytes(cluster, run_folder)))
    return result


def _orders(
    cluster: Cluster, processes: Sequence[Process], kernel: Kernel, wiring: Wiring, options: LabOptions
) -> dict[str, Any]:
    hosts = {}
    for host in cluster.hosts:
        netns = wiring.netns[host.name]
        lab = {
            "cluster": f"{ROOT}/cluster.toml",
            "host": host.name,
            "paced": options.paced and any(device.flops_per_s for device in host.devices),
            "delay": wiring.delay,
            "results": RESULTS,
        }
        hosts[host.name] = {
            "netns": netns,
            "interfaces": [card.interface for card in wiring.cards if card.host == host.name],
            "hosts_file": _hosts_file(wiring, host.name if options.bare else None),
            "lab": lab,
            "binds": {str(options.disks.resolve()): str(_disk(options.disks, host.name))} if options.disks else {},
        }
    with TemporaryDirectory(prefix="thinwire-") as folder:
        dump_cluster(imitated(cluster, wiring.delay), Path(folder) / "cluster.toml")
        text = (Path(folder) / "cluster.toml").read_text(encoding="utf-8")
    specs = []
    for index, process in enumerate(processes):
        variables = {**process.variables, "THINWIRE_LAB": HOST_FILE}
        if options.bare:
            variables = {name: value for name, value in variables.items() if name not in FIRST_CARD}
        argv = [kernel.tools["env"], *(f"{name}={value}" for name, value in variables.items()), *process.argv]
        specs.append({"host": process.host, "argv": argv, "streams": index == 0})
    return {
        "files": {"cluster.toml": text, **host_files(cluster)},
        "tools": kernel.tools,
        "steps": [asdict(step) for step in [*wiring.steps, *(bridges(wiring) if options.bare else ())]],
        "hosts": hosts,
        "processes": specs,
        "begins": next((process.begins for process in processes if process.begins), ""),
        "stalls": [asdict(step) for step in steps_of(options.stalls, cluster, wiring)],
        "cwd": os.getcwd(),
        "notice_s": options.notice_s,
        "grace_s": options.grace_s,
    }


def _disk(disks: Path, host: str) -> Path:
    """Of a host, made if it is not there."""
    path = disks.resolve() / host
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}, the disk of {host}, cannot be made: {error.strerror}") from None
    return path


def _hosts_file(wiring: Wiring, bare: str | None) -> str:
    """Names of all hosts. The second half is for servers on IPv6 sockets, which look callers up by mapped addresses.

    bare: the host whose own file this is, as Debian writes it.
    """
    known = {"localhost": "127.0.0.1", **wiring.addresses, **({bare: "127.0.1.1"} if bare else {})}
    plain = [f"{address} {name}" for name, address in known.items()]
    mapped = [f"::ffff:{address} {name}.lab" for name, address in known.items()]
    return "\n".join([*plain, *mapped, ""])


def _talk(kernel: Kernel, orders: dict[str, Any]) -> dict[str, Any]:
    """Start process 1, give it its orders, pass signals on, and return its answer."""
    command = [*(kernel.tools["setpriv"], "--pdeathsig", "KILL", *kernel.unshare), sys.executable, "-m", "thinwire.lab.inside"]
    answer_end, report_end = os.pipe()
    with ExitStack() as stack:
        stream = stack.enter_context(open(answer_end, encoding="utf-8"))
        try:
            file = stack.enter_context(NamedTemporaryFile("w", prefix="thinwire-", suffix=".json", encoding="utf-8"))
            json.dump(orders, file)
            file.flush()
            command += [file.name, str(report_end)]
            lab = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, pass_fds=(report_end,), start_new_session=True)
        finally:
            os.close(report_end)
        stack.callback(_end, lab)
        assert lab.stdin is not None
        line = lab.stdin

        def pass_on(number: int, _: object) -> None:
            with suppress(BrokenPipeError):
                line.write(bytes([number]))

        stack.enter_context(signals_handled(FORWARDED, pass_on))
        text = stream.read()
    if not text:
        raise UserError(f"the lab was ended from outside (exit code {lab.returncode}); nothing of it is left")
    answer: dict[str, Any] = json.loads(text)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def _end(lab: subprocess.Popen[bytes]) -> None:
    assert lab.stdin is not None
    lab.stdin.close()
    try:
        lab.wait(LEAVE_S)
    except subprocess.TimeoutExpired:
        lab.kill()
        lab.wait()


def _counted(card: Plug, answer: dict[str, Any]) -> Card:
    sent, received = answer["counters"][card.host][card.interface]
    out_bps, back_bps = card.out.bandwidth_bps.value, card.back.bandwidth_bps.value
    return Card(
        host=card.host,
        interface=card.interface,
        sent_bytes=sent,
        received_bytes=received,
        sent_share=8 * sent / (out_bps * answer["seconds"]),
        received_share=8 * received / (back_bps * answer["seconds"]),
    )


def _ledger_sent_bytes(cluster: Cluster, folder: RunFolder) -> dict[str, float]:
    """Bytes that each host sent by the ledger of a run; empty where the run left no ledger."""
    sent: Counter[str] = Counter()
    ledger = folder.ledger()
    for entry in ledger.entries if ledger else ():
        sent[cluster.host_of(entry.rank).name] += entry.wire_bytes  # type: ignore[assignment]
    return dict(sent)


def _failed(answer: dict[str, Any]) -> dict[str, Any] | None:
    """The process whose end explains most: exit code 1 may be the echo of another host's end, other codes are specific."""
    processes = answer["processes"]
    failed = [processes[index] for index in answer["failures"]] or [process for process in processes if process["code"] != 0]
    return min(failed, key=lambda process: process["code"] == 1, default=None)


def _failure(answer: dict[str, Any], failed: dict[str, Any] | None) -> str | None:
    """One line that names the host, how it ended, and its last line."""
    if failed is None:
        return None
    code = failed["code"]
    why = f"stopped by {signal.Signals(answer['signal']).name}" if answer["signal"] else ""
    if why and code in (-answer["signal"], 128 + answer["signal"]):
        return why
    how = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
    what = f"{failed['host']}: {how}: {failed['last_line'].removeprefix('thinwire: error: ')}"
    return f"{why}: {what}" if why else what
