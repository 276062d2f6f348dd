"""Codecs on one core: encode and decode beside a copy of the same float32 bytes in memory, and beside others' coders.

Rates are bytes of float32 read or made per second. Contenders take turns; in each of its turns a contender runs once untimed,
because memory that is new costs more than any of this, then the copy is timed, then encode and decode. `ratio` is the median of
encode / copy over the turns, so a machine whose speed drifts is fair to all. Bar: fused int8 and int4 encode at 0.35 of the copy
at least, and faster than every peer with as many bits that is installed, those with one scale for the whole vector included.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from thinwire.bench.codec_peers import Coder, find_peers
from thinwire.bench.registry import Rows
from thinwire.compress.base import CODECS, Codec, make_codec
from thinwire.compress.codecs.blocked import Fusable
from thinwire.compress.codecs.fused import fused_or_reason

DEFAULTS = {"numels": [1 << 22, 1 << 24], "turns": 7, "fused": True, "kinds": list(CODECS), "peers": True}
BAR = 0.35
BARRED = {"int8": 8, "int4": 4}


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows: case, numel, the three rates, ratio; bar and held where there is one. The cluster is not looked at."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        contenders, notes = _contenders(options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some peers announce their end
            return [row for numel in options["numels"] for row in _measure(contenders, numel, options["turns"])] + notes
    finally:
        torch.set_num_threads(threads)


def _contenders(options: Mapping[str, Any]) -> tuple[list[Coder], Rows]:
    found, notes = [], []
    reason = fused_or_reason() if options["fused"] else None
    for kind in options["kinds"]:
        plain = make_codec(SimpleNamespace(kind=kind))
        assert plain is not None
        found.append(_of_codec(kind, plain, None))
        if options["fused"] and isinstance(plain, Fusable):
            if reason is None:
                found.append(_of_codec(f"{kind} fused", type(plain)(fused=True), BARRED.get(kind)))
            else:
                notes.append({"case": f"{kind} fused: {reason}"})
    if options["peers"]:
        peers, reasons = find_peers()
        found += [replace(peer, case=f"peer: {peer.case}") for peer in peers]
        notes += [{"case": f"peer: {reason}"} for reason in reasons]
    return found, notes


def _of_codec(case: str, codec: Codec, barred_bits: int | None) -> Coder:
    def encode(values: torch.Tensor) -> tuple[torch.Tensor, int]:
        return codec.encode(values), values.numel()

    return Coder(case, encode, lambda code: codec.decode(*code), block=codec.block, barred_bits=barred_bits)


def _measure(contenders: list[Coder], numel: int, turns: int) -> Rows:
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
    rows: Rows = []
    for contender in contenders:
        gigabytes = numel // contender.block * contender.block * 4 / 1e9
        parts = enumerate(("copy", "encode", "decode"))
        rates = {f"{what}_gb_per_s": gigabytes / contender.median_s(part) for part, what in parts}
        ratio = median(copy_s / encode_s for copy_s, encode_s, _ in contender.times)
        rows.append({"case": contender.case, "numel": numel, **rates, "ratio": ratio})
    pairs = list(zip(contenders, rows, strict=True))
    for contender, row in pairs:
        if contender.barred_bits is not None:
            peers = (other["encode_gb_per_s"] for peer, other in pairs if peer.peer_bits == contender.barred_bits)
            fastest = max(peers, default=None)
            held = row["ratio"] >= BAR and (fastest is None or row["encode_gb_per_s"] > fastest)
            row |= {"fastest_peer_gb_per_s": fastest, "bar": BAR, "held": held}
    return rows


def _timed(action: Callable[[Any], Any], argument: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action(argument)
    return time.perf_counter() - started, result
