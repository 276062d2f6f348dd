"""What others have published of training over thin networks, predicted from the settings that they state.

What is stated of rates stands beside what it would explain:

    Streaming DiLoCo   Douillard et al. 2025 (arXiv 2501.18512), table 4, itself simulated: the bandwidth between two replicas
                       at which 5 methods reach utilisations of 50 to 99 %, for 1, 10 and 100 billion parameters. Their
                       simulator lets every exchange hide under the backward pass of its step, the overlapped ones under one
                       step more; values of 16 bits, 4 in the last. Predicted: the utilisation at each of their bandwidths.
    Covenant-72B       arXiv 2603.08163: 20 peers of 8 devices, a round of 30 steps in 20 minutes, 64 of 4096 values of 12 + 2
                       bits. They upload to a store and download those of all others. Predicted: the communication of a round,
                       with 500 and 110 Mbit/s for each device, and for each peer.
    INTELLECT-1        arXiv 2412.01152: 14 nodes, ring all-reduce of 8 bits every 100 steps. The rates of the links are not
                       stated, so what is shown is the rate at which our prediction would be theirs.

And what `thinwire plan` would choose on the same links: a peer as one device that takes the stated time to compute, coding for
nothing, as theirs hides it; only what replicas exchange is searched. Times are to the same loss: as stated stands theirs, with
the exchange predicted for it, and with the tokens that exchanging so rarely costs by the same numbers (`plan.penalties`).
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from thinwire.bench.registry import Rows
from thinwire.cluster import FRAME_OVERHEAD, Quantity
from thinwire.cluster.equal import equal_hosts
from thinwire.collectives.ledger import Ledger
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig, load_run
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.calibration import Factors
from thinwire.plan.candidates import Problem
from thinwire.plan.cost import Setting, predict
from thinwire.plan.measurements.table import shipped_tables
from thinwire.plan.search import search
from thinwire.sync.front import of_rare
from thinwire.sync.make import make_synchroniser
from thinwire.traffic import Transfer
from thinwire.train.outline import outline
from thinwire.workload import BACKWARD_OVER_FORWARD, Workload

DEFAULTS: Mapping[str, Any] = {}
BAR = 0.15
UTILISATIONS = (50, 80, 90, 95, 99)
SEQUENCE, VOCABULARY, HEAD_WIDTH = 2048, 32_000, 128
BACKWARD = BACKWARD_OVER_FORWARD / (1 + BACKWARD_OVER_FORWARD)
METHODS: Mapping[str, tuple[dict[str, Any], float, int]] = {
    "data parallel": ({"kind": "every_step"}, 0.0, 16),
    "diloco": ({"kind": "diloco", "every": 100}, BACKWARD, 16),
    "streaming": ({"kind": "streaming", "every": 100, "overlap": 0}, BACKWARD, 16),
    "streaming overlapped": ({"kind": "streaming", "every": 100}, BACKWARD, 16),
    "streaming overlapped 4 bits": ({"kind": "streaming", "every": 100}, BACKWARD, 4),
}
"""Options of [sync], the part of a step under which a rare exchange hides besides, bits a value."""


@dataclass(frozen=True)
class Rounds:
    """A run of rounds: `every` steps take `steps_s` of computing, then an exchange of `payload_bytes` by each of `peers`."""

    peers: int
    steps_s: float
    payload_bytes: float
    stated_s: float
    every: int
    parameters: float
    layers: int
    kind: str


COVENANT = Rounds(
    peers=20,
    steps_s=1200.0,
    payload_bytes=72e9 * 64 / 4096 * 14 / 8,
    stated_s=70.0,
    every=30,
    parameters=72e9,
    layers=80,
    kind="sparseloco",
)
INTELLECT = Rounds(
    peers=14,
    steps_s=38 * 60.0,
    payload_bytes=10e9,
    stated_s=8.3 * 60,
    every=100,
    parameters=10e9,
    layers=42,
    kind="diloco",
)
AT_ONCE = 1e18
STEPS = 100_000
"""Of both runs, about: the outer momentum's beginning is paid once."""
UP_BPS, DOWN_BPS, DEVICES = 110e6, 500e6, 8


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows: case, what, stated, predicted, ratio (of tables the worst of `numbers`), bar, held."""
    if cluster_name:
        raise UserError(f"--cluster {cluster_name}: the published runs bring their own networks; leave --cluster out")
    return [*utilisations(), *_rounds()]


def utilisations() -> Rows:
    """Of Streaming DiLoCo's table."""
    with (shipped_tables() / "thin" / "streaming_diloco_table4.csv").open(encoding="utf-8") as lines:
        return _utilisations(csv.DictReader(lines))


def _utilisations(table: Iterable[Mapping[str, str]]) -> Rows:
    rows: Rows = []
    for stated in table:
        size, method = float(stated["parameters"]), stated["method"]
        workload = Workload.of_transformer(shape(size, int(stated["layers"])), 1, SEQUENCE)
        found = [
            (at, 100 * _utilisation(workload, method, float(stated["step_s"]), float(stated[f"gbit_{at}"]) * 1e9))
            for at in UTILISATIONS
        ]
        at, worst = max(found, key=lambda one: abs(one[1] / one[0] - 1))
        row = {"case": f"Streaming DiLoCo, {stated['size']}, {method}", "what": "utilisation in %", "numbers": len(found)}
        rows.append(row | _judged(float(at), worst))
    return rows


def shape(parameters: float, layers: int) -> ModelConfig:
    """A plain transformer of about so many parameters: 12 L h^2 + V h."""
    root = (VOCABULARY**2 + 48 * layers * parameters) ** 0.5
    heads = round((root - VOCABULARY) / (24 * layers) / HEAD_WIDTH)
    return ModelConfig(
        layers=layers, width=heads * HEAD_WIDTH, heads=heads, vocabulary=VOCABULARY, context=SEQUENCE, mlp="gelu", tied=True
    )


def _utilisation(workload: Workload, method: str, step_s: float, rate_bps: float) -> float:
    """Of two replicas, each on a link of that rate for payload."""
    sync, hidden, bits = METHODS[method]
    if sync["kind"] == "every_step":  # a bucket is about a layer, as there
        sync = {**sync, "bucket_bytes": 4 * workload.num_parameters // len(workload.block_names)}
    config = RunConfig.model_validate({"sync": sync, "compress": {"kind": "bf16"}})
    layout = Layout(data=2) if sync["kind"] == "every_step" else Layout(outer=2)
    setting = Setting(
        cluster=equal_hosts(2, rate_bps * FRAME_OVERHEAD),
        layout=layout,
        workload=workload,
        micro_batches=1,
        flops_per_s=(workload.flops_per_microbatch / step_s,) * 2,
    )

    def theirs(transfer: Transfer) -> Transfer:
        window = transfer.window_flops + hidden * workload.flops_per_microbatch
        return replace(transfer, work_s=0.0, message_bytes=transfer.message_bytes * bits // 16, window_flops=window)

    synchroniser = make_synchroniser(config.sync, config.compress, layout, Ledger())
    found = predict(setting, [theirs(one) for one in synchroniser.traffic(workload, layout)])
    return found.compute_s / (found.compute_s + found.exposed_s)


def _rounds() -> Rows:
    rows: Rows = []
    for each, links in (("device", DEVICES), ("peer", 1)):
        up_s = COVENANT.payload_bytes * 8 * FRAME_OVERHEAD / (links * UP_BPS)
        down_s = (COVENANT.peers - 1) * COVENANT.payload_bytes * 8 * FRAME_OVERHEAD / (links * DOWN_BPS)
        case = f"Covenant-72B, {DOWN_BPS / 1e6:g} down and {UP_BPS / 1e6:g} Mbit/s up for each {each}"
        seconds = up_s + down_s
        parts = {"communication of a round in s": (COVENANT.stated_s, seconds)}
        parts["utilisation in %"] = (94.5, 100 * COVENANT.steps_s / (COVENANT.steps_s + seconds))
        rows += [{"case": case, "what": what, "numbers": 1} | _judged(*pair) for what, pair in parts.items()]
        rows.append(_chosen(case, COVENANT, seconds, (links * UP_BPS, links * DOWN_BPS)))
    p = INTELLECT.peers
    sent_bytes = 2 * (p - 1) / p * INTELLECT.payload_bytes
    needed_bps = sent_bytes * 8 * FRAME_OVERHEAD / INTELLECT.stated_s
    row = {"case": "INTELLECT-1, rate not stated", "what": "Mbit/s that explain 8.3 minutes", "numbers": 1}
    rows.append(row | {"stated": None, "predicted": needed_bps / 1e6, "ratio": None, "bar": BAR, "held": None})
    rates = (needed_bps, needed_bps)
    return [*rows, _chosen("INTELLECT-1, at that rate", INTELLECT, INTELLECT.stated_s, rates)]


def _chosen(case: str, rounds: Rounds, exchange_s: float, rates_bps: tuple[float, float]) -> dict[str, Any]:
    """Days to the same loss: theirs (as stated) with exchanges of so many seconds, and by our best plan. rates_bps: up, down."""
    up_bps, down_bps = rates_bps
    shape_of = shape(rounds.parameters, rounds.layers)
    step_s = rounds.steps_s / rounds.every
    flops_per_s = Workload.of_transformer(shape_of, 1, SEQUENCE).flops_per_microbatch / step_s
    equal = equal_hosts(rounds.peers, up_bps)
    links = tuple(
        replace(one, bandwidth_bps=Quantity(up_bps if one.source.startswith("host") else down_bps)) for one in equal.links
    )
    rate, at_once = Quantity(flops_per_s), Quantity(AT_ONCE)  # their steps are whole
    devices = [replace(host.devices[0], flops_per_s=rate, memory_bytes_per_s=at_once) for host in equal.hosts]
    hosts = tuple(replace(host, devices=(device,)) for host, device in zip(equal.hosts, devices, strict=True))
    kept = (f"layout.outer={rounds.peers}", "layout.data=1", "layout.pipe=1", "layout.tensor=1", "layout.expert=1")
    config = load_run(None, [f"model.context={SEQUENCE}", f"train.sequence={SEQUENCE}", *kept])
    problem = Problem(
        cluster=replace(equal, hosts=hosts, links=links),
        config=config,
        shape=shape_of,
        batch=rounds.peers,
        tokens=float(STEPS * rounds.peers * SEQUENCE),
        kept=frozenset(one.partition("=")[0] for one in kept),
        outline=Factors(coding=0.0).outline(outline),
        times=(1,),
    )
    best = search(problem, refined=0).best
    stated_s = STEPS * (rounds.steps_s + exchange_s) / rounds.every
    stated_s *= of_rare(rounds.kind, problem.parameters, rounds.peers, rounds.every, 0, STEPS)
    row = {"case": case, "what": f"days to the same loss, by {best.candidate}", "numbers": 1, "bar": None, "held": None}
    return row | {"stated": stated_s / 86400, "predicted": best.time_s / 86400, "ratio": best.time_s / stated_s}


def _judged(stated: float, predicted: float) -> dict[str, Any]:
    ratio = predicted / stated
    return {"stated": stated, "predicted": predicted, "ratio": ratio, "bar": BAR, "held": abs(ratio - 1) <= BAR}
