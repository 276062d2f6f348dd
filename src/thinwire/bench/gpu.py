"""Gradients through codes on a device: what coding costs there, and what it saves where ranks exchange over a thin network.

Codecs: encode and decode beside a copy of the same float32 values on the device, and whether payloads have the CPU's bits.
Steps: plain DistributedDataParallel, its hooks, and `compress_gradients`, in turns on the same ranks; in the lab, where a cluster
is named, ranks share the devices there are. Where there is no GPU all of it runs on CPUs, over gloo, and the rows say so.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.cluster import load_cluster
from thinwire.compress.base import CODECS, Codec, make_codec
from thinwire.lab.run import LabOptions
from thinwire.measure.compute import find_device, kind_of

DEFAULTS: Mapping[str, Any] = {
    "methods": ["none", "ddp", "ddp-fp16", "ddp-powersgd4", "bf16", "int8", "int4", "powersgd4"],
    "kinds": list(CODECS),
    "numel": 1 << 26,
    "turns": 7,
    "ranks": 2,
    "preset": "30m",
    "micro_batch": 16,
    "sequence": 256,
    "steps": 8,
}
COPY_BAR: Mapping[str, float] = {
    **dict.fromkeys(("bf16", "fp16", "int8", "int4", "fp4", "sign"), 0.7),
    **dict.fromkeys(("topk", "ternary"), 0.25),
}
"""Least part of the copy rate, of encode and of decode, on a GPU."""
STEP_BAR: Mapping[str, tuple[str, float]] = {
    "bf16": ("ddp", 1.9),
    "int8": ("ddp", 3.4),
    "int4": ("ddp", 6.0),
    "powersgd4": ("ddp-powersgd4", 3.0),
}
"""How many times faster than which other method, on GPUs at 1 Gbit/s."""
EXACT = ("bf16", "fp16", "int8", "int4", "fp4")
"""Codecs whose arithmetic is rounded once, and so alike everywhere."""
CHECKED = 1 << 20
"""Values whose payloads are compared with the CPU's."""


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row for each codec, then one for each method; `held` where there is a bar, on a GPU only."""
    device = find_device(0)
    rows = [_codec_row(kind, device, options) for kind in options["kinds"]]
    where = load_cluster(cluster_name) if cluster_name else options["ranks"]
    names = ("methods", "preset", "micro_batch", "sequence", "steps")
    settings = {name: options[name] for name in names}
    lab = None if cluster_name is None else LabOptions(paced=False)
    if not options["methods"]:
        return rows
    found = run_script(where, "device_steps", settings, lab, title=cluster_name or "loopback").results["device_steps"]
    seconds = {one["method"]: one["step_s"] for one in found["methods"]}
    for one in found["methods"]:
        row = {"case": "step", "device": found["device"], "ranks": found["ranks"], "devices": found["devices"], **one}
        other, bar = STEP_BAR.get(one["method"], ("", 0.0))
        if other in seconds:
            row |= {"against": other, "ratio": seconds[other] / one["step_s"]}
            if device.type != "cpu":
                row |= {"bar": bar, "held": row["ratio"] >= bar}
        rows.append(row)
    return rows


def _codec_row(kind: str, device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    codec = make_codec(SimpleNamespace(kind=kind))
    assert codec is not None
    numel = options["numel"] // codec.block * codec.block
    values = torch.randn(numel, device=device)
    copy, payload = torch.empty_like(values), codec.encode(values)
    codec.decode(payload, numel)
    turns = []
    for _ in range(options["turns"]):
        jobs = (lambda: copy.copy_(values), lambda: codec.encode(values), lambda: codec.decode(payload, numel))
        turns.append([_seconds(job, device) for job in jobs])
    encode, decode = (median(copy_s / its[part] for copy_s, *its in turns) for part in (0, 1))
    row = {"case": "codec", "codec": kind, "device": kind_of(device), "values": numel, "encode_of_copy": encode}
    row |= {"decode_of_copy": decode, "bits_equal": _same_bits(codec, values)}
    if device.type != "cpu" and kind in COPY_BAR:
        held = min(encode, decode) >= COPY_BAR[kind] and (row["bits_equal"] or kind not in EXACT)
        row |= {"bar": COPY_BAR[kind], "held": held}
    return row


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
