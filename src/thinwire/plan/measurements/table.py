"""Tables of measured training steps: read from CSV by column name, each row a job with what was measured; the form: docs/plan.md.

Unknown columns are ignored. A row that lacks what a prediction needs, contradicts itself, or names a device that nobody knows is
left out, with the reason. What a row does not say is taken as usual, and that too is counted.

Flop formulas, where a row gives only Tflop/s (B sequences of s tokens, L layers, h width, V vocabulary, N parameters):

    megatron_4pass   96 B s L h^2 (1 + s / (6 h) + V / (16 L h))
    megatron_3pass   72 B s L h^2 (1 + s / (6 h) + V / (12 L h))
    palm             (6 N + 12 L h s) s B
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from math import inf
from operator import attrgetter
from pathlib import Path

from thinwire.errors import UserError
from thinwire.plan.gpu.job import Job
from thinwire.plan.gpu.priors import GIB, Device, priors

NEEDED = ("layers", "width", "sequence", "num_devices", "device")
USUAL_INTER_GBITS = (100.0, 200.0, 400.0)
"""A device's share of its host's cards where a row is silent, by generation: InfiniBand EDR, HDR and NDR, a card a device."""
LARGEST = 1e15
CONTRADICTS = 1.5
"""Times by which two statements of one row on its time may differ."""
KEY = attrgetter("layers", "width", "sequence", "devices", "data", "tensor", "pipe", "micro_batch", "global_batch")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row. seconds: of a step, None if it did not fit; group: rows of one model; memory_bytes: peak of the fullest device."""

    number: int
    table: str
    job: Job
    seconds: float | None
    memory_bytes: float | None
    oom: bool | None
    group: str

    @property
    def key(self) -> str:
        """Under which the same measurement is found in another file."""
        return f"{KEY(self.job)} {self.seconds or 0:.4g}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """One file. left_out: reasons with their numbers of rows; assumed: what rows did not say, likewise."""

    name: str
    rows: tuple[Measured, ...]
    left_out: Mapping[str, int]
    assumed: Mapping[str, int]

    @property
    def timed(self) -> tuple[Measured, ...]:
        """Rows with seconds."""
        return tuple(row for row in self.rows if row.seconds is not None)


def read_folder(folder: Path) -> list[Table]:
    """Every .csv in it; one that is no table has no rows and says why. UserError if there is none."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise UserError(f"{folder}: there is no .csv file in it; --measurements names a folder of tables")
    tables = []
    for path in files:
        try:
            tables.append(read_table(path))
        except UserError as error:
            tables.append(Table(name=path.stem, rows=(), left_out={str(error): 0}, assumed={}))
    return tables


def read_table(path: Path) -> Table:
    """A file. UserError if it cannot be read as CSV or has none of the columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from None
    if lines and not set(NEEDED) & set(lines[0]):
        raise UserError(f"{path}: has none of the columns {', '.join(NEEDED)}; docs/plan.md describes the form")
    rows, left_out, assumed = [], Counter[str](), Counter[str]()
    name = next((line["table"] for line in lines if line.get("table")), path.stem)
    for number, line in enumerate(lines):
        cells = _Cells({str(key).strip(): str(value or "").strip() for key, value in line.items() if key})
        try:
            rows.append(_row(cells, name, number))
        except _LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        assumed.update(cells.assumed)
    return Table(name=name, rows=tuple(rows), left_out=dict(left_out), assumed=dict(assumed))


class _LeftOut(Exception):
    """Why a row cannot be used."""


class _Cells:
    """Cells of one row, by name; what was assumed in their place."""

    def __init__(self, cells: Mapping[str, str]) -> None:
        self._cells = cells
        self.assumed: set[str] = set()

    def text(self, name: str) -> str:
        return self._cells.get(name, "")

    def number(self, name: str) -> float | None:
        """None for an empty cell; the row is left out for one that is no number."""
        text = self.text(name).replace(",", "")
        if text.lower() in ("", "nan", "none", "null", "-", "n/a"):
            return None
        if NUMBER.fullmatch(text) is None or abs(float(text)) > LARGEST:
            raise _LeftOut(f"{name} is no number: {text[:30]!r}")
        return float(text)

    def degree(self, name: str) -> int:
        """1 for an empty cell."""
        value = self.number(name)
        return max(1, round(value)) if value is not None else 1

    def usual(self, name: str, value: float, about: str) -> float:
        """The cell, or what is usual."""
        found = self.number(name)
        if found is not None and found > 0:
            return found
        self.assumed.add(f"{name} {about}")
        return value


def _row(cells: _Cells, table: str, number: int) -> Measured:
    missing = [name for name in NEEDED if not cells.text(name)]
    if missing:
        raise _LeftOut(f"no {', '.join(missing)}")
    device = priors().device(cells.text("device"))
    if device is None:
        raise _LeftOut(f"unknown device {cells.text('device')}")
    job = _job(cells, device)
    oom_cell = cells.number("oom")
    seconds = None if oom_cell == 1 else _seconds(cells, job)
    if seconds is not None and not 0 < seconds < inf:
        raise _LeftOut(f"{seconds:g} seconds is no time")
    memory = cells.number("memory_gib")
    if seconds is None and memory is None and oom_cell != 1:
        raise _LeftOut("nothing measured: no iter_time_s, tokens_per_s_per_device or tflops_per_device")
    return Measured(
        number=number,
        table=table,
        job=job,
        seconds=seconds,
        memory_bytes=memory * GIB if memory else None,
        oom=None if oom_cell is None and seconds is None else oom_cell == 1,
        group=cells.text("model") or f"{job.width}x{job.layers}",
    )


def _job(cells: _Cells, device: Device) -> Job:
    layers, width = cells.degree("layers"), cells.degree("width")
    world = cells.degree("num_devices")
    tensor, pipe, seq = (cells.degree(name) for name in ("tensor", "pipe", "seq"))
    inner = tensor * pipe * seq
    data = cells.number("data")
    if data is None:
        data = max(1, world // inner)
        if data * inner != world:
            raise _LeftOut("tensor x pipe x seq does not divide num_devices")
    if round(data) * inner != world:
        raise _LeftOut("data x tensor x pipe x seq is not num_devices")
    zero = round(cells.number("zero") or 0)
    micro, total = cells.number("micro_batch"), cells.number("global_batch")
    if micro is None and total is None:
        raise _LeftOut("no micro_batch and no global_batch")
    micro = micro if micro else max(1.0, (total or 1) / data) if pipe == 1 else 1.0
    total = total if total else micro * data
    if pipe > 1 and zero == 3 and total <= micro * data and micro > 1:
        cells.assumed.add("micro_batch is one replica's batch, of which a pipeline makes single sequences")
        micro = 1.0
    precision, remark = cells.text("precision").lower(), cells.text("remark").lower()
    precision_name = next((one for one in ("fp8", "bf16", "fp16", "fp32") if precision.startswith(one)), "bf16")
    recompute = cells.text("recompute").lower()
    per_host = round(cells.usual("devices_per_host", 8, "taken as 8"))
    intra = cells.usual("intra_gbytes_per_s", device.intra_bytes_per_s / 1e9, f"as {device.name} has")
    inter = USUAL_INTER_GBITS[device.generation]
    if world > per_host:
        inter = cells.usual("inter_gbits_per_s", inter, f"taken as {inter:.0f}")
    sequence_parallel = cells.number("sequence_parallel") == 1 and tensor > 1
    interleave = cells.degree("interleave")
    if "interleav" in cells.text("schedule").lower() or cells.text("schedule").lower() == "1f1b-i":
        each = -(-layers // pipe)
        interleave = interleave if interleave > 1 else each if each <= 4 else 2
    heads = round(cells.usual("heads", _usual_heads(width), "taken as about width / 128"))
    return Job(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=round(cells.number("kv_heads") or heads),
        hidden=round(cells.number("hidden") or 4 * width),
        gated=cells.number("gated") == 1,
        tied=cells.number("tied") != 0,
        vocabulary=round(cells.usual("vocabulary", 50304, "taken as 50304")),
        sequence=cells.degree("sequence"),
        experts=cells.degree("experts"),
        experts_per_token=cells.degree("experts_per_token"),
        precision=precision_name,
        device=device,
        per_host=per_host,
        devices=world,
        intra_bytes_per_s=intra * 1e9,
        inter_bytes_per_s=(cells.number("inter_gbits_per_s") or inter) * 1e9 / 8,
        data=round(data),
        tensor=tensor,
        pipe=pipe,
        seq=seq,
        expert=cells.degree("expert"),
        interleave=interleave,
        zero=zero,
        sequence_parallel=sequence_parallel,
        micro_batch=max(1, round(micro)),
        global_batch=max(1, round(total)),
        schedule=cells.text("schedule") or "1f1b",
        recompute="full" if "full" in recompute else "selective" if "selective" in recompute else "none",
        offload=cells.text("offload").lower(),
        compiled="compile=1" in remark,
        hidden_tensor="async_tp=1" in remark or (device.generation == 2 and sequence_parallel and zero < 3),
        stages=_stages(remark, layers, pipe),
        fused=_fused(precision_name, device, zero, recompute),
        wide_gradients="fp32 grad" in precision or (precision_name in ("bf16", "fp8") and zero < 3),
    )


def _usual_heads(width: int) -> int:
    """The number of equal heads of an even width that come nearest to 128."""
    widths = [head for head in range(2, min(width, 512) + 1, 2) if width % head == 0]
    return width // min(widths, key=lambda head: abs(head - 128)) if widths else 1


def _fused(precision: str, device: Device, zero: int, recompute: str) -> bool:
    """No row says which attention ran. It came with bfloat16 and FSDP; Megatron of float16 days, and where all is computed again
    on devices before H100, kept scores."""
    if precision in ("fp16", "fp32"):
        return False
    return device.generation == 2 or zero == 3 or "full" not in recompute


def _stages(remark: str, layers: int, pipe: int) -> tuple[int, ...]:
    """From "layers by stage [0 9 15 21 30]" (bounds) or "layers by stage 5 7 7 7" (counts), which count embeddings, norm and head
    too: a third of those that are no blocks lie before them."""
    found = re.search(r"layers by stage (\[)?([\d ]+)", remark)
    if found is None:
        return ()
    numbers = [int(text) for text in found.group(2).split()]
    counts = [b - a for a, b in pairwise(numbers)] if found.group(1) else numbers
    others = sum(counts) - layers
    if len(counts) != pipe or others < 0:
        return ()
    counts[0] -= others // 2 if others < 3 else others // 3
    counts[-1] -= others - (others // 2 if others < 3 else others // 3)
    return tuple(counts) if min(counts) >= 0 else ()


def _seconds(cells: _Cells, job: Job) -> float | None:
    rate, seconds = cells.number("tflops_per_device"), cells.number("iter_time_s")
    tokens = job.global_batch * job.sequence
    if not seconds and (tokens_per_s := cells.number("tokens_per_s_per_device")):
        return tokens / (tokens_per_s * job.devices)
    if not rate:
        return seconds or None
    s, layers, h, vocabulary = job.sequence, job.layers, job.width, job.vocabulary
    match cells.text("flop_formula"):
        case "megatron_4pass":
            flops = 96 * tokens * layers * h**2 * (1 + s / (6 * h) + vocabulary / (16 * layers * h))
        case "megatron_3pass":
            flops = 72 * tokens * layers * h**2 * (1 + s / (6 * h) + vocabulary / (12 * layers * h))
        case "palm":
            billions = cells.number("params_b")
            flops = (6 * (billions * 1e9 if billions else job.parameters) + 12 * layers * h * s) * tokens
        case other:
            if seconds:
                return seconds
            raise _LeftOut(f"unknown flop_formula {other!r}")
    implied = flops / (rate * 1e12 * job.devices)
    if seconds and not 1 / CONTRADICTS < implied / seconds < CONTRADICTS:
        raise _LeftOut("iter_time_s and tflops_per_device contradict each other")
    return seconds or implied


def shipped_tables() -> Path:
    """The folder of tables that come with thinwire: in an installed package, or in the repository."""
    installed = Path(str(resources.files("thinwire"))) / "validation"
    return installed if installed.is_dir() else Path(__file__).parents[4] / "validation"
