"""Devices and links as priors: what is taken of them before anything is measured. Numbers and their sources: `priors.toml`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from thinwire.cluster import FRAME_OVERHEAD
from thinwire.tomlfile import read_toml

GIB = 2**30


@dataclass(frozen=True, kw_only=True, eq=False)
class Device:
    """One accelerator. flops_per_s: what a large product reaches, by precision; units: among which tiles are shared out."""

    name: str
    flops_per_s: Mapping[str, float]
    units: int
    memory_bytes_per_s: float
    memory_bytes: float
    intra_bytes_per_s: float
    intra_part: float
    attention: float
    attention_best: float

    @property
    def generation(self) -> int:
        """0 before A100, 1 with it, 2 after it: software of the time went along."""
        return 2 if "fp8" in self.flops_per_s else 1 if self.flops_per_s["bf16"] == self.flops_per_s["fp16"] else 0


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """How kernels use a device; see `priors.toml`."""

    k_half: float
    host_s: float
    memory_part: float
    aligned: Mapping[int, float]
    tiles: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """How collectives use links; see `priors.toml`."""

    latency_intra_s: float
    setup_s: float
    latency_inter_s: float
    rdma_part: float
    tcp_part: float
    tcp_message_part: float
    tcp_below_gbits: float
    tcp_flow_gbits: float
    first_zero3_gbytes: float

    def part(self, inter_bytes_per_s: float, sharing: int, *, ring: bool = True) -> float:
        """Of the rate of cards that so many devices share that is reached, by a ring or by messages from one to another."""
        gbits = inter_bytes_per_s * 8e-9
        if gbits >= self.tcp_below_gbits:
            return self.rdma_part
        if not ring:
            return self.tcp_message_part
        return max(self.tcp_part, min(1 / FRAME_OVERHEAD, self.tcp_flow_gbits / (gbits * sharing)))


@dataclass(frozen=True, kw_only=True)
class Priors:
    """All of them."""

    devices: Mapping[str, Device]
    kernels: Kernels
    fabric: Fabric

    def device(self, name: str) -> Device | None:
        """By the words in a name: "A100-SXM4-80GB" is a100-80gb, "h100" the first H100. None if it is not known; of several
        joined by + the slowest."""
        found = [self._one(part) for part in name.split("+")]
        known = [device for device in found if device is not None]
        return min(known, key=lambda device: device.flops_per_s["fp16"]) if known and len(known) == len(found) else None

    def _one(self, name: str) -> Device | None:
        words = set(re.split(r"[^a-z0-9.]+", name.lower()))
        like = [one for key, one in self.devices.items() if words and self._family(key) <= words]
        return max(like, key=lambda one: len(words & set(one.name.split("-"))), default=None)

    @staticmethod
    def _family(key: str) -> set[str]:
        parts = key.split("-")
        return set(parts[:2]) if parts[0] in ("rtx", "tpu") else {parts[0]}


@cache
def priors() -> Priors:
    """As the package ships them."""
    content = read_toml(Path(str(resources.files("thinwire.plan.gpu"))) / "priors.toml")
    kernel = content["kernel"]
    return Priors(
        devices={name: _device(name, one) for name, one in content["device"].items()},
        kernels=Kernels(
            **{
                **kernel,
                "aligned": {int(key): part for key, part in kernel["aligned"].items()},
                "tiles": tuple((m, n, part) for m, n, part in kernel["tiles"]),
            }
        ),
        fabric=Fabric(**content["fabric"]),
    )


def _device(name: str, one: Mapping[str, Any]) -> Device:
    parts = {"fp8": one.get("achievable_fp8", one["achievable"])}
    return Device(
        name=name,
        flops_per_s={key: 1e12 * peak * parts.get(key, one["achievable"]) for key, peak in one["peak"].items()},
        units=one["units"],
        memory_bytes_per_s=1e12 * one["memory"]["rate"],
        memory_bytes=GIB * one["memory"]["size"],
        intra_bytes_per_s=1e9 * one["intra"],
        intra_part=one.get("intra_part", 0.8),
        attention=one["attention"],
        attention_best=one.get("attention_best", one["attention"]),
    )
