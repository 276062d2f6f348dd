"""Ways to synchronise gradients, by name, as `thinwire bench sync` compares them.

    ddp  ddp-fp16  ddp-powersgdR      PyTorch's DistributedDataParallel: plain, and with its hooks (R: rank of the approximation)
    none                              ours without compression
    KIND  KINDn                       a kind of [compress]; n: the rank of powersgd and svd, the k of topk and demo
    KIND-all                          with embeddings and vectors coded too
    KIND-nofeedback                   without error feedback
    KIND-fused                        with compiled kernels
    KIND-256k                         with buckets of 256 KiB
    SYNCn                             a kind of [sync] that exchanges every n steps: diloco30, streaming30, sparseloco30, ..
    SYNCn-KIND                        the same through a kind of [compress]
    streamingN-overlap5-layers2       with so many steps of overlap, and layers in a fragment
    SYNCn-outer70-momentum50-mixing0  with an outer learning rate of 0.7, an outer momentum of 0.5, a mixing of 0
    METHOD-rate200                    with twice the learning rate of the others
    torchft-dilocoN                   torchft's DiLoCo every N steps, float32
    hivemind-CODE                     hivemind's averaging of gradients every step; CODE: fp32, fp16, u8 or q8

What a method changes of the run (its optimizer, say) is in `TRAIN`, by kind.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from thinwire.compress.base import CODECS, make_codec
from thinwire.compress.codecs.blocked import Fusable
from thinwire.config.run import RunConfig, TrainSection
from thinwire.errors import UserError
from thinwire.tomlfile import validate

STOCK = re.compile(r"ddp(?:-(?P<hook>fp16|powersgd(?P<rank>[1-9]\d*)))?")
TORCHFT = re.compile(r"torchft-diloco(?P<every>[1-9]\d*)")
HIVEMIND = re.compile(r"hivemind-(?P<code>fp32|fp16|u8|q8)")
KIND = re.compile(r"(?P<kind>[a-z_]+)(?P<number>[1-9]\d*)")
NUMBERED = re.compile(r"(?P<what>[a-z]+)(?P<number>0|[1-9]\d*)")
BUCKETS = re.compile(r"([1-9]\d*)k")
NUMBERS: Mapping[str, str] = {"powersgd": "rank", "svd": "rank", "topk": "k", "demo": "k"}
"""What the number behind a kind's name sets."""
RARE = ("local_sgd", "diloco", "streaming", "sparseloco", "muloco", "noloco")
SYNC_NUMBERS: Mapping[str, str] = {"overlap": "overlap", "layers": "layers_per_fragment"}
SYNC_PERCENT: Mapping[str, str] = {"outer": "outer_learning_rate", "momentum": "outer_momentum", "mixing": "mixing"}
RATE = "rate"
"""Percent of the learning rate that all methods share. Replicas that go alone have gradients of fewer tokens, and where noise
rules, AdamW moves along the gradient by less: by half for a quarter of the tokens. So they want a higher rate."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "all": {"exclude": [], "vectors": True},
    "nofeedback": {"feedback": False},
    "fused": {"fused": True},
}
TRAIN: Mapping[str, Mapping[str, Any]] = {
    "muloco": {"optimizer": {"kind": "muon"}},
    "demo": {"optimizer": {"kind": "signsgd"}, "learning_rate": 1e-3, "clip": 0.0},
}
"""Changes to [train] that belong to a kind: DeMo's momentum is in its exchange, and only the sign of what comes out is used."""


@dataclass(frozen=True, slots=True)
class Method:
    """A name and all that follows from it. hook: of a stock peer, "" for plain DDP, else None; rank: of its PowerSGD.

    package: that does it, "" for PyTorch and ours; code: what hivemind sends.
    """

    name: str
    config: RunConfig
    hook: str | None = None
    rank: int = 0
    package: str = ""
    code: str = ""


def make_method(name: str, base: Mapping[str, Any], *, fused: bool = False) -> Method:
    """`base`: the sections of the run that all methods share. fused: where the codec can. UserError for an unknown name."""
    stock = STOCK.fullmatch(name)
    if stock:
        hook = "powersgd" if stock["rank"] else stock["hook"] or ""
        return Method(name, _config(name, base, {}, {}), hook, int(stock["rank"] or 0))
    sync = dict(base.get("sync", {}))
    torchft, hivemind = TORCHFT.fullmatch(name), HIVEMIND.fullmatch(name)
    if torchft:
        rarely = {**base, "sync": sync | {"kind": "diloco", "every": int(torchft["every"])}}
        return Method(name, _config(name, rarely, {}, {}), package="torchft")
    if hivemind:
        return Method(name, _config(name, base, {}, {}), package="hivemind", code=hivemind["code"])
    word, *variants = name.split("-")
    if word in ("torchft", "hivemind"):
        raise UserError(f"method {name!r}: of others there are torchft-dilocoN and hivemind-fp32, -fp16, -u8 and -q8")
    rare = KIND.fullmatch(word)
    if rare and rare["kind"] in RARE:
        sync |= {"kind": rare["kind"], "every": int(rare["number"])}
        sync.pop("bucket_bytes", None)  # shared by those who average gradients; here each replica is one rank
        compress: dict[str, Any] = {}
    else:
        rare, compress = None, compress_section(word)
    percent = 100
    for variant in variants:
        buckets, number = BUCKETS.fullmatch(variant), NUMBERED.fullmatch(variant)
        if number and number["what"] in SYNC_NUMBERS:
            sync[SYNC_NUMBERS[number["what"]]] = int(number["number"])
        elif number and number["what"] in SYNC_PERCENT:
            sync[SYNC_PERCENT[number["what"]]] = int(number["number"]) / 100
        elif number and number["what"] == RATE:
            percent = int(number["number"])
        elif buckets:
            sync["bucket_bytes"] = int(buckets[1]) * 1024
        elif variant in VARIANTS:
            compress |= VARIANTS[variant]
        elif rare and "kind" not in compress:
            compress = {**compress_section(variant), **compress}
        else:
            raise UserError(f"method {name!r}: there is no variant {variant!r}; there are {', '.join(VARIANTS)}, and 256k")
    if fused and compress and _has_kernels(compress["kind"]):
        compress["fused"] = True
    changes = dict(TRAIN.get(sync["kind"] if rare else compress["kind"], {}))
    if percent != 100:
        shared = base.get("train", {}).get("learning_rate", TrainSection().learning_rate)
        changes["learning_rate"] = changes.get("learning_rate", shared) * percent / 100
    return Method(name, _config(name, {**base, "sync": sync}, compress, changes))


def compress_section(word: str) -> dict[str, Any]:
    """The section [compress]; a kind it does not have is found out by its validation."""
    numbered = KIND.fullmatch(word)
    if numbered and numbered["kind"] in NUMBERS:
        return {"kind": numbered["kind"], NUMBERS[numbered["kind"]]: int(numbered["number"])}
    return {"kind": word}


def _has_kernels(kind: str) -> bool:
    return kind in CODECS and isinstance(make_codec(SimpleNamespace(kind=kind)), Fusable)


def _config(name: str, base: Mapping[str, Any], compress: Mapping[str, Any], train: Mapping[str, Any]) -> RunConfig:
    content = {**base, "train": {**base.get("train", {}), **train}, "compress": dict(compress)}
    return validate(RunConfig, content, f"method {name!r}")
