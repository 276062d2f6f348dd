"""Methods to synchronise gradients, by name, as `thinwire bench sync` compares them; and what each has learned, kept in a file.

    ddp  ddp-fp16  ddp-powersgdR      PyTorch's DistributedDataParallel: plain, and with its hooks (R: rank of the approximation)
    none                              ours without compression
    KIND  KINDn                       a kind of [compress]; n: the rank of powersgd and svd, the k of topk and demo
    KIND-all                          with embeddings and vectors coded too
    KIND-nofeedback                   without error feedback
    KIND-noprecondition               coded as gradients are, not in units of the optimizer's second moments
    KIND-fused                        with compiled kernels
    KIND-256k                         with buckets of 256 KiB
    SYNCn                             a kind of [sync] that exchanges every n steps: diloco30, streaming30, retrace5, ..
    SYNCn-KIND                        the same through a kind of [compress]
    streamingN-overlap5-layers2       with so many steps of overlap, and layers in a fragment
    streamingN-overlap5-add           with what a replica has moved since added to what arrives, in place of mixing
    SYNCn-first60x2                   an exchange every 2 steps in the first 60; several pairs follow each other
    SYNCn-outer70-momentum50-mixing0  with an outer learning rate of 0.7, an outer momentum of 0.5, a mixing of 0
    METHOD-rate200                    with twice the learning rate of the others
    METHOD-batch2                     with twice the tokens of the others in a step, and half their steps; what the rows say of a
                                      step is then of as many tokens as the others' have
    torchft-dilocoN                   torchft's DiLoCo every N steps, float32
    hivemind-CODE                     hivemind's averaging of gradients every step; CODE: fp32, fp16, u8 or q8

torchft and hivemind are compared on the same terms: first weights, batches, optimizer, clipping, pace, turns of whole periods.
But each is started by itself, with steps without any exchange in turns beside it, because it brings servers, heartbeats and
processes of its own, which would work in the others' turns. So a machine whose speed drifts is fair to utilisation, which has
both sides from one start, less so to step_s. The differences that show in the rows:

    wire_bytes_per_step   not known: they send past the ledger; card_bytes_per_step has it all, with heartbeats and look-ups
    processor_s           with their processes; threads and processes of rank 0 only, which also serves the others
    wait_s                not known of torchft, which exchanges inside the optimizer's step
    torn                  not 0 where hivemind lost values and went on; torchft's exchange is whole, or the run ends
    weights_apart         not 0 for hivemind, which gives each rank what the others made of its share with errors of its own
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from thinwire.compress.base import CODECS, make_codec
from thinwire.compress.codecs.blocked import Fusable
from thinwire.config.run import RunConfig, TrainSection
from thinwire.errors import UserError
from thinwire.tomlfile import validate

STOCK = re.compile(r"ddp(?:-(?P<hook>fp16|powersgd(?P<rank>[1-9]\d*)))?")
PACKAGES = re.compile(r"(?P<torchft>torchft)-diloco(?P<every>[1-9]\d*)|hivemind-(?P<code>fp32|fp16|u8|q8)")
KIND = re.compile(r"(?P<kind>[a-z_]+)(?P<number>[1-9]\d*)")
VARIANT = re.compile(r"(?P<what>[a-z]+)(?P<number>0|[1-9]\d*)|(?P<bucket_kib>[1-9]\d*)k")
FIRST = re.compile(r"first(?P<steps>[1-9]\d*)x(?P<every>[1-9]\d*)")
NUMBERS: Mapping[str, str] = {"powersgd": "rank", "svd": "rank", "topk": "k", "demo": "k"}
"""What the number behind a kind's name sets."""
RARE = ("local_sgd", "diloco", "streaming", "sparseloco", "muloco", "noloco", "retrace")
SYNC_NUMBERS: Mapping[str, str] = {"overlap": "overlap", "layers": "layers_per_fragment"}
SYNC_PERCENT: Mapping[str, str] = {"outer": "outer_learning_rate", "momentum": "outer_momentum", "mixing": "mixing"}
RATE = "rate"
"""Percent of the learning rate that all methods share. Replicas that go alone have gradients of fewer tokens, and where noise
rules, AdamW moves along the gradient by less: by half for a quarter of the tokens. So they want a higher rate."""
BATCH = "batch"
"""Batches of the others in a step."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "all": {"exclude": [], "vectors": True},
    "nofeedback": {"feedback": False},
    "noprecondition": {"precondition": False},
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

    package: that does it, "" for PyTorch and ours; code: what hivemind sends; batches: of the others, in one of its steps.
    """

    name: str
    config: RunConfig
    hook: str | None = None
    rank: int = 0
    package: str = ""
    code: str = ""
    batches: int = 1


def make_method(name: str, base: Mapping[str, Any], *, fused: bool = False) -> Method:
    """`base`: the sections of the run that all methods share. fused: where the codec can. UserError for an unknown name."""
    if stock := STOCK.fullmatch(name):
        hook = "powersgd" if stock["rank"] else stock["hook"] or ""
        return Method(name, _config(name, base, {}, {}), hook, int(stock["rank"] or 0))
    sync = dict(base.get("sync", {}))
    if package := PACKAGES.fullmatch(name):
        sync |= {"kind": "diloco", "every": int(package["every"])} if package["torchft"] else {}
        config = _config(name, {**base, "sync": sync}, {}, {})
        return Method(name, config, package=package["torchft"] or "hivemind", code=package["code"] or "")
    word, *variants = name.split("-")
    if word in ("torchft", "hivemind"):
        raise UserError(f"method {name!r}: of others there are torchft-dilocoN and hivemind-fp32, -fp16, -u8 and -q8")
    rare = KIND.fullmatch(word)
    compress: dict[str, Any] = {}
    if rare and rare["kind"] in RARE:
        sync |= {"kind": rare["kind"], "every": int(rare["number"])}
        sync.pop("bucket_bytes", None)  # shared by those who average gradients; here each replica is one rank
    else:
        rare, compress = None, compress_section(word)
    percent, batches = 100, 1
    for variant in variants:
        match = VARIANT.fullmatch(variant)
        what, number = (match["what"], int(match["number"] or match["bucket_kib"])) if match else ("", 0)
        if match and match["bucket_kib"]:
            sync["bucket_bytes"] = number * 1024
        elif first := FIRST.fullmatch(variant):
            sync["first"] = [*sync.get("first", ()), (int(first["steps"]), int(first["every"]))]
        elif what in SYNC_NUMBERS:
            sync[SYNC_NUMBERS[what]] = number
        elif what in SYNC_PERCENT:
            sync[SYNC_PERCENT[what]] = number / 100
        elif what == RATE:
            percent = number
        elif what == BATCH and number:
            batches = number
        elif variant == "add":
            sync["arrival"] = variant
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
    if batches > 1:
        changes |= _batched(name, base, batches)
    return Method(name, _config(name, {**base, "sync": sync}, compress, changes), batches=batches)


def _batched(name: str, base: Mapping[str, Any], batches: int) -> dict[str, int]:
    """Of [train]: as many tokens in fewer steps, as many of them to warm up."""
    train = _config(name, base, {}, {}).train
    if train.steps % batches:
        raise UserError(f"method {name!r}: {train.steps} steps are no whole number of steps of {batches} batches; change steps")
    return {"micro_batch": train.micro_batch * batches, "steps": train.steps // batches}


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


def check_packages(methods: Sequence[Method]) -> None:
    """UserError for what is not installed, and for steps that end between two exchanges of torchft."""
    for method in methods:
        if method.package and importlib.util.find_spec(method.package) is None:
            raise UserError(f"method {method.name!r}: {method.package} is not installed; pip install 'thinwire[peers]'")
        steps, every = method.config.train.steps, getattr(method.config.sync, "every", 1)
        if method.package and steps % every:
            raise UserError(f"method {method.name!r} trains whole periods of {every} steps: steps = {steps} is no multiple of it")


def launches(methods: Sequence[Method]) -> list[list[Method]]:
    """The methods that share processes: each of other packages alone; then all of PyTorch's and ours, if any."""
    together = [method for method in methods if not method.package]
    return [[method] for method in methods if method.package] + ([together] if together else [])


def key_of(method: Method, seed: int, ranks: int, curve: Sequence[int]) -> str:
    """What was learned is kept under this: the method's configuration, the seed, the number of ranks and the steps of the curve.

    Links and turns are not in it, because results do not depend on the wire. seed: in place of the configuration's.
    """
    config = method.config.model_dump(mode="json")
    made_from = [method.name, config | {"train": config["train"] | {"seed": seed}}, ranks, list(curve)]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def keep(path: Path, key: str, learned: Mapping[str, Any]) -> None:
    """Add a line of JSON for one method and seed, so that a comparison that takes hours can go on where it was stopped."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key, **learned}) + "\n")


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """{key: what was learned}; a last line that was cut off does not count."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    lines = [json.loads(line) for line in whole.splitlines()]
    return {line.pop("key"): line for line in lines}
