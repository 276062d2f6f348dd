"""The traces of ranks, from what torch.profiler has written on GPUs (Kineto): the device's kernels in place of our own marks.

    a call      a kernel that names its collective (torch 2.3 or newer, NCCL); it is issued where it begins
    a wait      the part of it in which the device does nothing else
    passes      backward is what the threads of autograd have launched; data what the device idles while the loader is asked
    clocks      a collective ends on all ranks at once: the median of these differences is by how much two clocks differ

No torch.
"""

import gzip
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.collectives.wire import OPS
from thinwire.errors import UserError
from thinwire.why.trace import BACKWARD, BACKWARD_END, DATA, DATA_END, FORWARD, OPTIMIZER, STEP, Call, Event, Mark, Trace, Wait

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ITEM_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "BFloat16": 2, "Half": 2}
"""Of one number; 1 for all other types."""


def read_traces(paths: Sequence[Path]) -> tuple[list[Trace], list[float]]:
    """(traces by rank, what to add to each rank's clock). One file stands for all ranks, which are then taken to be alike.

    UserError for what is no such trace, and for some ranks of several.
    """
    found = {rank: (trace, world) for rank, trace, world in map(_read, paths)}
    world = max(size for _, size in found.values())
    if len(found) not in (1, world) or len(found) < len(paths):
        raise UserError(f"{len(paths)} traces of {len(found)} ranks of {world}: give that of one rank, or one of each")
    if len(found) == world:
        traces = [found[rank][0] for rank in sorted(found)]
        return traces, _offsets(traces)
    trace = next(iter(found.values()))[0]
    if any(len(event.group) < world for event in trace if isinstance(event, Call)):
        raise UserError(f"{paths[0]}: some calls are within a part of the {world} ranks; give the trace of each rank")
    return [trace] * world, [0.0] * world


def _read(path: Path) -> tuple[int, Trace, int]:
    """(rank, trace, world size)"""
    try:
        data = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_text(encoding="utf-8"))
        events = [one for one in data["traceEvents"] if one.get("ph") == "X"]
        about = data["distributedInfo"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no trace of torch.profiler on several ranks: {type(error).__name__} {error}") from None
    kernels = sorted((one for one in events if one.get("cat") in DEVICE), key=itemgetter("ts"))
    calls = [one for one in kernels if "Collective name" in one.get("args", {})]
    if not calls:
        raise UserError(f"{path}: no kernel names a collective; profile on GPUs over NCCL, with torch 2.3 or newer")
    return int(about["rank"]), _trace(events, kernels, calls), int(about["world_size"])


def _trace(events: Sequence[dict[str, Any]], kernels: Sequence[dict[str, Any]], calls: Sequence[dict[str, Any]]) -> Trace:
    computing = [one for one in kernels if "Collective name" not in one.get("args", {})]
    busy = _union(computing)
    found: list[tuple[float, Event]] = []
    for one in calls:
        begun, ended = _span(one)
        call = Call(begun, *_what(one["args"]), ended=ended)
        idle_s = ended - begun - _covered(busy, begun, ended)
        found += [(begun, call), (ended, Wait(ended - idle_s, ended, call))]
    shown = [one for one in events if one.get("cat") == "gpu_user_annotation" and one["name"].startswith("Optimizer.step#")]
    updates = sorted(map(_span, shown))
    ends = [ended for _, ended in updates]
    for begun, ended in updates:
        found += [(begun, Mark(begun, OPTIMIZER)), (ended, Mark(ended, STEP))]
    autograd = {one["tid"] for one in events if one["name"].startswith("autograd::engine::evaluate_function")}
    launched = {_correlation(one) for one in events if one.get("cat") == "cuda_runtime" and one["tid"] in autograd}
    for begin, end in zip([float("-inf"), *ends], [*ends, float("inf")], strict=True):
        own = [one for one in computing if begin <= _span(one)[0] < end]
        if begin in ends and own:
            found.append((_span(own[0])[0], Mark(_span(own[0])[0], FORWARD)))
        if backward := [_span(one) for one in own if _correlation(one) in launched]:
            found += [(backward[0][0], Mark(backward[0][0], BACKWARD)), (backward[-1][1], Mark(backward[-1][1], BACKWARD_END))]
    for one in events:
        if one["name"].startswith("enumerate(DataLoader)"):
            begun, ended = _span(one)
            idle_from = max([begun, *(end for start, end in busy if start < ended and end > begun)])
            if idle_from < ended:
                found += [(idle_from, Mark(idle_from, DATA)), (ended, Mark(ended, DATA_END))]
    return [event for _, event in sorted(found, key=itemgetter(0))]


def _what(about: dict[str, Any]) -> tuple[str, int, tuple[int, ...]]:
    """(op, message bytes, group) of a call."""
    plain = re.sub(r"_|base|coalesced|intotensor|tensor|v$", "", str(about["Collective name"]).lower())
    op = {known.replace("_", ""): known for known in OPS}.get(plain)
    if op is None:
        raise UserError(f"a kernel of the trace is a collective {about['Collective name']!r}; known: {', '.join(OPS)}")
    ranks = tuple(int(rank) for rank in re.findall(r"\d+", str(about.get("Process Group Ranks", ""))))
    if len(ranks) != int(about["Group size"]):  # long lists are cut short
        ranks = tuple(range(int(about["Group size"])))
    return op, int(about["In msg nelems"]) * ITEM_BYTES.get(about["dtype"], 1), ranks


def _offsets(traces: Sequence[Trace]) -> list[float]:
    ends: list[dict[tuple[tuple[int, ...], int], float]] = []
    for trace in traces:
        numbers: Counter[tuple[int, ...]] = Counter()
        ends.append({})
        for event in trace:
            if isinstance(event, Call):
                ends[-1][event.group, numbers[event.group]] = event.ended
                numbers[event.group] += 1
    found = defaultdict(list, {0: [0.0]})
    for rank in range(1, len(traces)):
        found[rank] = [ends[0][key] - ended for key, ended in ends[rank].items() if key in ends[0]]
    return [median(found[rank] or [0.0]) for rank in range(len(traces))]


def _span(one: dict[str, Any]) -> tuple[float, float]:
    return one["ts"] * 1e-6, (one["ts"] + one["dur"]) * 1e-6


def _correlation(one: dict[str, Any]) -> Any:
    return one.get("args", {}).get("correlation")


def _union(kernels: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for begun, ended in map(_span, kernels):
        if found and begun <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], ended)
        else:
            found.append((begun, ended))
    return found


def _covered(spans: Sequence[tuple[float, float]], begun: float, ended: float) -> float:
    first = max(0, bisect_right(spans, (begun, float("inf"))) - 1)
    total = 0.0
    for start, end in spans[first:]:
        if start >= ended:
            break
        total += max(0.0, min(end, ended) - max(start, begun))
    return total
