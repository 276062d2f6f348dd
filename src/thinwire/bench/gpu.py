"""What thinwire does on GPUs, each number beside its bar: codecs, steps, losses, predicted terms, collectives, memory.

One table, whose first column is a key of `SHOWN`. Steps are of PyTorch's own methods and ours, in turns on the same ranks; with a
cluster in the lab, whose ranks share the devices there are, and then also what `thinwire train` predicts beside what it measures,
and collectives of two racks. Where there is no GPU all but `coding` runs on CPUs, over gloo: no bar is held there.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from thinwire.bench import collectives
from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.cluster import load_cluster
from thinwire.compress.base import CODECS, Codec, make_codec
from thinwire.errors import UserError
from thinwire.lab.commands import processes_for
from thinwire.lab.run import LabOptions, launch
from thinwire.measure.compute import find_device, kind_of, shared_gpus
from thinwire.record import RunFolder
from thinwire.report.facts import PARTS, Facts, card_rows, step_rows
from thinwire.units import show

SHOWN = {
    "time": "seconds of all of it",
    "terms": "the parts of a step, predicted and measured",
    "steps": "seconds of a step against PyTorch's methods",
    "losses": "held-out losses against theirs",
    "codecs": "codes against a copy in the device's memory",
    "coding": "what codes cost a step where the wire costs nothing",
    "collectives": "chosen collectives against NCCL's own",
    "memory": "the most memory that a method takes",
}
DEFAULTS: Mapping[str, Any] = {
    "parts": [part for part in SHOWN if part not in ("time", "memory")],
    "methods": [
        *("none", "ddp", "ddp-fp16", "ddp-powersgd4", "bf16", "int8", "int4", "powersgd4"),
        *("fsdp", "sharded", "none30", "streaming30-int4"),
    ],
    "thin_methods": ["none", "ddp-powersgd4", "int4", "powersgd4"],
    "thin": "four-hosts-100mbit",
    "racks": "two-racks-gpu",
    "kinds": list(CODECS),
    "numel": 1 << 26,
    "turns": 7,
    "ranks": 4,
    "preset": "30m",
    "large": "124m",
    "micro_batch": 16,
    "sequence": 256,
    "steps": 6,
    "learners": ["ddp", "int8", "int4", "fsdp", "sharded"],
    "seeds": 3,
    "train_steps": 300,
    "model": {"layers": 4, "width": 128, "heads": 4, "context": 64, "init_std": 0.06},
}


@dataclass(frozen=True)
class Bar:
    """What a value is to be, at least or at most."""

    value: float
    most: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.most else '>='} {self.value:g}"

    def holds(self, value: float) -> bool:
        return value <= self.value if self.most else value >= self.value


COPY_BAR: Mapping[str, Bar] = {
    **dict.fromkeys(("bf16", "fp16", "int8", "int4", "fp4", "sign"), Bar(0.7)),
    **dict.fromkeys(("topk", "ternary"), Bar(0.25)),
}
"""Of the copy rate, for encode and for decode."""
EXACT = ("bf16", "fp16", "int8", "int4", "fp4")
"""Codecs whose arithmetic is rounded once, and so alike everywhere."""
CHECKED = 1 << 20
"""Values whose payloads are compared with the CPU's."""
STEP_BAR: Mapping[str, tuple[str, Bar]] = {
    "bf16": ("ddp", Bar(1.9)),
    "int8": ("ddp", Bar(3.4)),
    "int4": ("ddp", Bar(6.0)),
    "powersgd4": ("ddp-powersgd4", Bar(3.0)),
    "sharded": ("fsdp", Bar(3.0)),
    "streaming30-int4": ("none30", Bar(0.95)),
}
"""How many times faster than which other method, at 1 Gbit/s."""
STEP_BAR_OF = "four-hosts-1gbit"
LOSS_BAR, CODING_BAR, MEMORY_BAR = Bar(1.005, most=True), Bar(0.05, most=True), Bar(2.3, most=True)
LOSS_OF = {"int8": "ddp", "int4": "ddp", "sharded": "fsdp"}
STEP_ERROR, TERM_ERROR, TERM_ERROR_S = Bar(0.10, most=True), Bar(0.15, most=True), 0.005
SUM_ERROR, CARD_ERROR, ONE_HOST, ALL_S = Bar(0.02, most=True), Bar(0.08, most=True), Bar(0.99), Bar(480.0, most=True)
OF_BOUND = Bar(1.15, most=True)
TERMS = (
    ("four-hosts-1gbit", "preset", "none"),
    ("four-hosts-100mbit", "preset", "int4"),
    ("four-hosts-1gbit", "large", "int4"),
    ("four-hosts-100mbit", "large", "powersgd"),
)
"""Cluster, which of the two models, and what carries gradients."""
MIB = 1 << 20
RACK_CASES = (
    collectives.Case("all_reduce", 4 * MIB, 3.4),
    *(collectives.Case(op, 4 * MIB, 0.97) for op in ("reduce_scatter", "all_gather", "all_to_all", "broadcast")),
)


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows of the parts that `options` name; without a cluster without those that take a lab. `held` on GPUs only."""
    if unknown := sorted(set(options["parts"]) - set(SHOWN)):
        raise UserError(f"parts: there is no {unknown[0]!r}; there are {', '.join(SHOWN)}")
    parts: Mapping[str, Callable[[], Rows]] = {
        "codecs": lambda: [row for kind in options["kinds"] for row in _codec(kind, options)],
        "coding": lambda: _coding(options) if find_device(0).type != "cpu" else [],
        "steps": lambda: _steps(cluster_name, options),
        "losses": lambda: _losses(options),
        "terms": lambda: _terms(options) if cluster_name else [],
        "collectives": lambda: _collectives(options) if cluster_name else [],
    }
    started = time.perf_counter()
    rows = [row for part in options["parts"] for row in parts.get(part, list)()]
    return [*rows, row_of("time", "all", ", ".join(options["parts"]), time.perf_counter() - started, ALL_S)]


def row_of(
    shows: str,
    case: str,
    what: str,
    value: float,
    bar: Bar | None = None,
    note: str = "",
    seconds: tuple[float | None, float | None] = (None, None),
) -> dict[str, Any]:
    """seconds: of ours and of what it is compared with."""
    ours_s, other_s = seconds
    on_gpu = find_device(0).type != "cpu"
    return {
        "shows": shows,
        "case": case,
        "what": what,
        "ours_s": ours_s,
        "other_s": other_s,
        "value": value,
        "bar": None if bar is None else str(bar),
        "held": bar.holds(value) if bar is not None and on_gpu else None,
        "note": note,
    }


def _codec(kind: str, options: Mapping[str, Any]) -> Rows:
    """Encode and decode."""
    device, codec = find_device(0), make_codec(SimpleNamespace(kind=kind))
    assert codec is not None
    numel = options["numel"] // codec.block * codec.block
    values = torch.randn(numel, device=device)
    copy, payload = torch.empty_like(values), codec.encode(values)
    codec.decode(payload, numel)
    jobs = (lambda: copy.copy_(values), lambda: codec.encode(values), lambda: codec.decode(payload, numel))
    copy_s, *coding_s = (
        median(turn) for turn in zip(*([_seconds(job, device) for job in jobs] for _ in range(options["turns"])), strict=True)
    )
    equal = _same_bits(codec, values)
    note, case = f"the CPU's bits: {'yes' if equal else 'no'}", f"{kind_of(device)}, {numel} values"
    rows = [
        row_of("codecs", case, f"{kind} {what} against a copy", copy_s / took_s, COPY_BAR.get(kind), note, (took_s, copy_s))
        for what, took_s in zip(("encode", "decode"), coding_s, strict=True)
    ]
    return [row | {"held": row["held"] and (equal or kind not in EXACT)} for row in rows]


def _same_bits(codec: Codec, values: torch.Tensor) -> bool:
    some = values[: CHECKED // codec.block * codec.block]
    return torch.equal(codec.encode(some).cpu(), codec.encode(some.cpu()))


def _seconds(job: Callable[[], Any], device: torch.device) -> float:
    """Of one call, until the device has done it."""
    started = time.perf_counter()
    job()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def _coding(options: Mapping[str, Any]) -> Rows:
    """int4 in a group that sends nothing, PyTorch's fake one; what it delivers is no value, at which a CPU would look."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from thinwire.bench.peers.device_steps import measure

    settings = {"methods": ["none", "int4"], "preset": options["large"]}
    settings |= {name: options[name] for name in ("micro_batch", "sequence", "steps")}
    here = SimpleNamespace(settings=settings, report=lambda *_: None, environment=SimpleNamespace(here=(0, 1)))
    dist.init_process_group("fake", rank=0, world_size=options["ranks"], store=FakeStore())
    try:
        none_s, int4_s = (one["step_s"] for one in measure(here)["methods"])  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()
    what = "int4: what a step takes longer"
    return [row_of("coding", f"{options['large']}, no wire", what, int4_s / none_s - 1, CODING_BAR, "", (int4_s, none_s))]


def _steps(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Of all methods, and of some where the links are thinner."""
    rows = step_table(cluster_name, options["methods"], _stepped(cluster_name, options["methods"], options))
    if cluster_name and options["thin_methods"]:
        rows += step_table(options["thin"], options["thin_methods"], _stepped(options["thin"], options["thin_methods"], options))
    return rows


def _stepped(cluster_name: str | None, methods: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    where = load_cluster(cluster_name) if cluster_name else options["ranks"]
    settings = {name: options[name] for name in ("preset", "micro_batch", "sequence", "steps")} | {"methods": methods}
    lab = LabOptions(paced=False) if cluster_name else None
    found: dict[str, Any] = run_script(where, "device_steps", settings, lab, title=cluster_name or "loopback").results[
        "device_steps"
    ]
    return found | {"preset": options["preset"]}


def step_table(cluster_name: str | None, methods: Sequence[str], found: Mapping[str, Any]) -> Rows:
    """Seconds of each method, against what it is to beat, and the memory that it takes."""
    by_name = {one["method"]: one for one in found["methods"]}
    shared = shared_gpus(found["ranks"]) or f"{found['ranks']} ranks on {found['device']}"
    case, rows = f"{cluster_name or 'loopback'}, {found['preset']}, {shared}", []
    for name in methods:
        one = by_name[name]
        other, bar = STEP_BAR.get(name, ("ddp", None))
        other_s = by_name[other]["step_s"] if other in by_name else one["step_s"]
        against = f" against {other}" if other in by_name and other != name else ""
        note = f"weights apart by {one['weights_apart']:.2g}"
        bar = bar if against and cluster_name == STEP_BAR_OF else None
        rows.append(row_of("steps", case, f"{name}{against}", other_s / one["step_s"], bar, note, (one["step_s"], other_s)))
    for name in methods if by_name[methods[0]]["peak_bytes"] else ():
        one, ddp = by_name[name], by_name.get("ddp", by_name[methods[0]])
        above = (one["peak_bytes"] - ddp["peak_bytes"]) / one["gradient_bytes"]
        note = f"peak {show(one['peak_bytes'], 'B')}, gradients {show(one['gradient_bytes'], 'B')}"
        what = f"{name} above {ddp['method']}, in sizes of the gradients"
        rows.append(row_of("memory", case, what, above, MEMORY_BAR if name == "int4" and "ddp" in by_name else None, note))
    return rows


def _losses(options: Mapping[str, Any]) -> Rows:
    """On loopback, as losses do not depend on the wire."""
    train = {"steps": options["train_steps"], "micro_batch": 4, "sequence": 64, "learning_rate": 2e-3, "eval_tokens": 65_536}
    settings = {"methods": options["learners"], "seeds": options["seeds"], "run": {"train": train, "model": options["model"]}}
    losses = run_script(options["ranks"], "device_learning", settings, title="losses").results["device_learning"]
    case = f"{options['train_steps']} steps, {options['seeds']} seeds, {options['ranks']} ranks"
    rows = []
    for name, other in LOSS_OF.items():
        if name in losses and other in losses:
            ours, theirs = mean(losses[name]), mean(losses[other])
            note = f"{ours:.4f}, {other} {theirs:.4f}"
            rows.append(row_of("losses", case, f"{name} against {other}", ours / theirs, LOSS_BAR, note))
    return rows


def _terms(options: Mapping[str, Any]) -> Rows:
    """`thinwire train` in the lab."""
    rows: Rows = []
    for name, which, kind in TERMS:
        with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
            changes = {"model.preset": options[which], "compress.kind": kind, "train.run": f"{folder}/run", "train.steps": 12}
            changes |= {"train.micro_batch": options["micro_batch"], "train.sequence": options["sequence"], "train.log_every": 3}
            changes |= {"train.eval_every": 0, "train.eval_tokens": 4096}
            command = ["thinwire", "train", *(part for key, value in changes.items() for part in ("--set", f"{key}={value}"))]
            cluster = load_cluster(name)
            done = launch(cluster, processes_for(cluster, command), LabOptions(paced=False))
            if done.failure:
                raise UserError(f"{name}: {done.failure}")
            assert done.run_folder is not None, "a run that did not fail has one"
            rows += term_table(f"{name}, {options[which]}, {kind}", Facts(RunFolder.open(done.run_folder)))
    return rows


def term_table(case: str, facts: Facts) -> Rows:
    """Of one run: each part of a step as predicted and as measured, their sum, and the ledger beside the cards."""
    rows, steps = [], {row.key: row for row in step_rows(facts)}
    for key, one in steps.items():
        if key not in (*PARTS, "step_s") or not isfinite(one.predicted) or not isfinite(one.measured):
            continue
        off_s, bar = abs(one.predicted - one.measured), STEP_ERROR if key == "step_s" else TERM_ERROR
        error = off_s / one.measured if one.measured else 0.0
        small = key != "step_s" and off_s <= TERM_ERROR_S
        note = f"off by {show(off_s, 's')}, which is little" if small else ""
        row = row_of("terms", case, f"{one.name}: error", error, bar, note, (one.predicted, one.measured))
        rows.append(row | ({"held": True} if small and row["held"] is not None else {}))
    measured = [steps[key].measured for key in PARTS if key in steps and isfinite(steps[key].measured)]
    apart = abs(sum(measured) / steps["step_s"].measured - 1)
    rows.append(row_of("terms", case, "parts that do not add up to the step", apart, SUM_ERROR))
    if cards := [abs(row.difference) for row in card_rows(facts) if isfinite(row.difference)]:
        rows.append(row_of("terms", case, "cards above the ledger", max(cards), CARD_ERROR))
    return rows


def _collectives(options: Mapping[str, Any]) -> Rows:
    """On two racks whose ranks alternate, and on one host."""
    settings = {**collectives.DEFAULTS, "turns": 3, "repeats": 5}
    found = collectives.measure(load_cluster(options["racks"]), RACK_CASES, settings)
    alone = {"turns": 5, "repeats": 20, "short_s": 0.05, "tried": 3, "cases": [["all_reduce", 4 * MIB, False]], "costs": {}}
    (turns,) = (one["turns"] for one in run_script(2, "collective_turns", alone, title="one host").results["collective_turns"])
    native_s, ours_s = min(turns["native"]), min(turns["ours"])
    rows = collective_table(RACK_CASES, found)
    what = "all_reduce of 4 MiB against NCCL's own"
    return [*rows, row_of("collectives", "one host", what, native_s / ours_s, ONE_HOST, "", (ours_s, native_s))]


def collective_table(cases: Sequence[collectives.Case], found: Rows) -> Rows:
    """found: rows of `bench collectives`, of short calls one after a barrier and one back to back."""
    bars, rows = {case.op: Bar(case.bar) for case in cases}, []
    for one in found:
        case, op, seconds = one["case"], one["op"], (one["ours_s"], one["native_s"])
        what = f"{op} of {show(one['bytes'], 'B')}"
        rows.append(row_of("collectives", case, f"{what} against NCCL's own", one["ratio"], bars[op], one["algorithm"], seconds))
        if op == "all_reduce":
            bound = (one["ours_s"], one["bound_s"])
            rows.append(row_of("collectives", case, f"{what} in sizes of the bound", one["of_bound"], OF_BOUND, "", bound))
    return rows
