"""`thinwire bench queue`: do messages of many senders wait for a link as long as queueing theory says?

In the lab, messages over one link of `link_bps`, in the order in which they come (`plan.queueing` has the formulas):

    Poisson     gaps drawn from an exponential distribution, one from each of equally likely parts of it, so that few are enough;
                at utilisation `poisson`; expected: M/D/1
    periodic    `sources` senders, each once in a period, at phases that are drawn anew every two periods, of which the first is
                not counted; at utilisation `periodic`; expected: nD/D/1
    incast      as many senders at once, every two periods

After a pause a link's bucket lets some 2 ms of its rate pass unshaped: `message_bytes` is a multiple of that.
"""

import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

from thinwire.bench.registry import Rows
from thinwire.cluster import FRAME_OVERHEAD
from thinwire.cluster.equal import equal_hosts
from thinwire.errors import UserError
from thinwire.lab.commands import Process
from thinwire.lab.run import RESULTS, launch
from thinwire.plan.queueing import Queue

DEFAULTS: Mapping[str, Any] = {
    "link_bps": 100e6,
    "message_bytes": 500_000,
    "poisson": 0.5,
    "periodic": 0.8,
    "sources": 4,
    "seconds": 240.0,
    "seed": 0,
}
BAR = 0.10


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows: case, sources, arrivals, utilisation, mean waiting (predicted_s by the formula, simulated_s of the very arrivals
    that were drawn, measured_s), ratio = measured_s / predicted_s, number_waiting, bar, held.

    number_waiting is predicted, by Little's law. UserError with a cluster: the benchmark builds its own.
    """
    if cluster_name:
        raise UserError(f"--cluster {cluster_name}: this benchmark builds its own links; give --set link_bps=...")
    service_s = options["message_bytes"] * 8 * FRAME_OVERHEAD / options["link_bps"]
    cases = _cases(service_s, options, random.Random(options["seed"]))
    waited = _measure(service_s, options, cases)
    rows: Rows = []
    for name, (queue, arrivals, counted) in cases.items():
        seconds, simulated_s = (
            fmean(one for one, counts in zip(waits, counted, strict=True) if counts)
            for waits in (waited[name], waits_of(arrivals, service_s))
        )
        row = {"case": name, "sources": queue.sources, "arrivals": len(arrivals), "utilisation": queue.utilisation}
        row |= {
            "predicted_s": queue.waiting_s,
            "simulated_s": simulated_s,
            "measured_s": seconds,
            "ratio": seconds / queue.waiting_s,
        }
        row |= {"number_waiting": queue.number_waiting, "bar": BAR, "held": abs(seconds / queue.waiting_s - 1) <= BAR}
        rows.append(row)
    return rows


def waits_of(arrivals: Sequence[float], service_s: float) -> list[float]:
    """What each waits if the first comes first (Lindley's recursion)."""
    waits, left_s, last_s = [], 0.0, 0.0
    for when_s in arrivals:
        left_s, last_s = max(0.0, left_s - (when_s - last_s)), when_s
        waits.append(left_s)
        left_s += service_s
    return waits


def _cases(service_s: float, options: Mapping[str, Any], draw: random.Random) -> dict[str, tuple[Queue, list[float], list[bool]]]:
    """By name: the queue, when messages arrive, and whether each counts."""
    sources = options["sources"]
    rate = options["poisson"] / service_s
    count = round(options["seconds"] * rate)
    gaps = [-log(1 - (part + draw.random()) / count) / rate for part in range(count)]
    draw.shuffle(gaps)
    at_random = [sum(gaps[:end]) for end in range(1, count + 1)]

    period_s = sources * service_s / options["periodic"]
    periodic: list[tuple[float, bool]] = []
    rounds = round(options["seconds"] / (2 * period_s))
    for turn in range(rounds):
        phases = [draw.random() * period_s for _ in range(sources)]
        periodic += [((2 * turn + half) * period_s + phase, half == 1) for half in (0, 1) for phase in phases]
    periodic.sort()
    at_once = [2 * period_s * turn for turn in range(min(rounds, 20)) for _ in range(sources)]

    def queue(name: str, arrivals: Any, per_s: float) -> Queue:
        return Queue(name=name, arrivals=arrivals, sources=sources, arrivals_per_s=per_s, service_s=service_s)

    return {
        "Poisson": (queue("Poisson", "M/D/1", rate), at_random, [True] * count),
        "periodic": (
            queue("periodic", "nD/D/1", sources / period_s),
            [when for when, _ in periodic],
            [one for _, one in periodic],
        ),
        "incast": (queue("incast", "incast", sources / (2 * period_s)), at_once, [True] * len(at_once)),
    }


def _measure(
    service_s: float, options: Mapping[str, Any], cases: Mapping[str, tuple[Any, list[float], Any]]
) -> dict[str, list[float]]:
    """Seconds that each message waited, by case: one pair of hosts for Poisson arrivals, one for the others, at the same time."""
    script = [sys.executable, "-m", "thinwire.bench.peers.socket_queue"]
    with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
        files: list[str] = []
        for name, (_, arrivals, _) in cases.items():
            path = Path(folder) / name
            path.write_text(json.dumps({"name": name, "arrivals": arrivals}))
            files.append(str(path))
        numbers = [str(options["message_bytes"]), str(service_s)]
        processes = [
            Process("host0", (*script, "send", "host1", f"{RESULTS}/poisson.json", *numbers, files[0])),
            Process("host2", (*script, "send", "host3", f"{RESULTS}/others.json", *numbers, *files[1:])),
            Process("host1", (*script, "receive")),
            Process("host3", (*script, "receive")),
        ]
        done = launch(equal_hosts(4, options["link_bps"]), processes)
    if done.failure:
        raise UserError(done.failure)
    return {**json.loads(done.results["poisson.json"]), **json.loads(done.results["others.json"])}
