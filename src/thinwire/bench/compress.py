"""Codecs on one core: encode and decode beside a copy of the same float32 bytes in memory, and beside others' coders.

Rates are bytes of float32 read or made per second. Contenders take turns; in each of its turns a contender runs once untimed,
because memory that is new costs more than any of this, then the copy is timed, then encode and decode. `ratio` is the median of
encode / copy over the turns, so a machine whose speed drifts is fair to all. Bar: fused int8 and int4 encode at 0.35 of the copy
at least, and faster than every peer with as many bits that is installed, those with one scale for the whole vector included.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from thinwire.bench.codec_peers import find_peers
from thinwire.bench.registry import Rows, take
from thinwire.compress.base import CODECS, Codec, make_codec
from thinwire.compress.codecs.blocked import Fusable
from thinwire.compress.codecs.fused import fused_or_reason

DEFAULTS = {"numels": [1 << 22, 1 << 24], "turns": 7, "fused": True, "kinds": list(CODECS), "peers": True}
BAR = 0.35
BARRED = {"int8": 8, "int4": 4}


@dataclass
class _Contender:
    case: str
    encode: Callable[[torch.Tensor], Any]
    decode: Callable[[Any], torch.Tensor]
    block: int = 1
    peer_bits: int | None = None
    barred_bits: int | None = None
    times: list[tuple[float, float, float]] = field(default_factory=list)
    """(copy, encode, decode) in seconds, for each turn."""


def run(cluster_name: str | None = None, options: Mapping[str, Any] | None = None) -> Rows:
    """Rows: case, numel, the three rates, ratio; bar and held where there is one. The cluster is not looked at."""
    told = take(options or {}, DEFAULTS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        contenders, notes = _contenders(told)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some peers announce their end
            return [row for numel in told["numels"] for row in _measure(contenders, numel, told["turns"])] + notes
    finally:
        torch.set_num_threads(threads)


def _contenders(told: Mapping[str, Any]) -> tuple[list[_Contender], Rows]:
    found, notes = [], []
    reason = fused_or_reason() if told["fused"] else None
    for kind in told["kinds"]:
        plain = make_codec(SimpleNamespace(kind=kind))
        assert plain is not None
        found.append(_of_codec(kind, plain, None))
        if told["fused"] and isinstance(plain, Fusable):
            if reason is None:
                found.append(_of_codec(f"{kind} fused", type(plain)(fused=True), BARRED.get(kind)))
            else:
                notes.append({"case": f"{kind} fused: {reason}"})
    if told["peers"]:
        peers, reasons = find_peers()
        found += [_Contender(f"peer: {peer.name}", peer.encode, peer.decode, 256, peer.bits) for peer in peers]
        notes += [{"case": f"peer: {reason}"} for reason in reasons]
    return found, notes


def _of_codec(case: str, codec: Codec, barred_bits: int | None) -> _Contender:
    def decode(code: tuple[torch.Tensor, int]) -> torch.Tensor:
        return codec.decode(*code)

    return _Contender(case, lambda values: (codec.encode(values), values.numel()), decode, codec.block, None, barred_bits)


def _measure(contenders: list[_Contender], numel: int, turns: int) -> Rows:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    copy = torch.empty_like(values)
    for contender in contenders:
        contender.times.clear()
    for turn in range(turns + 1):
        for contender in contenders:
            whole = values[: numel // contender.block * contender.block]
            contender.decode(contender.encode(whole))  # so that memory for results of these sizes has been touched before
            copy_s, _ = _timed(copy[: whole.numel()].copy_, whole)
            encode_s, code = _timed(contender.encode, whole)
            decode_s, _ = _timed(contender.decode, code)
            if turn:  # the first compiles and warms up
                contender.times.append((copy_s, encode_s, decode_s))
    rates = {
        contender.case: numel // contender.block * contender.block * 4 / 1e9 / median(times[1] for times in contender.times)
        for contender in contenders
    }
    return [_row(contender, numel, rates, contenders) for contender in contenders]


def _timed(action: Callable[[Any], Any], argument: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action(argument)
    return time.perf_counter() - started, result


def _row(contender: _Contender, numel: int, rates: Mapping[str, float], contenders: list[_Contender]) -> dict[str, Any]:
    gigabytes = numel // contender.block * contender.block * 4 / 1e9
    ratio = median(copy_s / encode_s for copy_s, encode_s, _ in contender.times)
    row: dict[str, Any] = {
        "case": contender.case,
        "numel": numel,
        "copy_gb_per_s": gigabytes / median(times[0] for times in contender.times),
        "encode_gb_per_s": rates[contender.case],
        "decode_gb_per_s": gigabytes / median(times[2] for times in contender.times),
        "ratio": ratio,
    }
    if contender.barred_bits is not None:
        peers = [rates[other.case] for other in contenders if other.peer_bits == contender.barred_bits]
        fastest = max(peers, default=None)
        faster = fastest is None or rates[contender.case] > fastest
        row |= {"fastest_peer_gb_per_s": fastest, "bar": BAR, "held": ratio >= BAR and faster}
    return row
