"""Collectives among equal hosts, in closed form: a ring through every rank, which crosses each host once.

    inside a host    setup + (n - 1) alpha_i + x S (n - 1) / n / (B_i part)
    between hosts    setup + steps alpha_e + x S (n - 1) / n / min(B_i part, r B_e part)

Where a group crosses between sites, its ranks at each have their share of that uplink too.

x = 2 for an all-reduce, 1 for a reduce-scatter or an all-gather; r ranks of the group on a host, each with its share B_e of the
host's cards; steps = n - 1 for a ring, 2 log2(n) for an all-reduce, which takes a tree where that is faster (NCCL does).
"""

from __future__ import annotations

from math import log2
from typing import NamedTuple

from thinwire.plan.gpu.job import Job
from thinwire.plan.gpu.priors import priors


class Sent(NamedTuple):
    """Seconds by what they depend on: links inside hosts, links between them, latency between them."""

    intra: float = 0.0
    inter: float = 0.0
    latency: float = 0.0

    def plus(self, other: Sent) -> Sent:
        """Both, one after the other."""
        return Sent(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Sent:
        """As often."""
        return Sent(*(factor * value for value in self))


def collective_s(job: Job, axis: str, message_bytes: float, *, reduces: bool) -> Sent:
    """Of an all-reduce along an axis, or of one half of it. message_bytes: all of it."""
    hosts, inside = job.place(axis)
    ranks = hosts * inside
    if ranks == 1 or message_bytes <= 0:
        return Sent()
    fabric = priors().fabric
    rate = job.intra_bytes_per_s * job.device.intra_part
    wire = (2 if reduces else 1) * message_bytes * (ranks - 1) / ranks
    if hosts == 1:
        return Sent(intra=fabric.setup_s + (ranks - 1) * fabric.latency_intra_s + wire / rate)
    out = inside * job.inter_bytes_per_s * fabric.part(job.inter_bytes_per_s, job.per_host)
    steps = 2 * log2(ranks) if reduces else ranks - 1
    latency_s = max(fabric.latency_inter_s, job.latency_s)
    if axis in ("data", "shards", "outer") and (near := job.at_site(axis)):
        out = min(out, near * job.site_bytes_per_s * fabric.part(job.site_bytes_per_s, job.site_devices))
        latency_s += job.site_latency_s
    return Sent(inter=wire / min(rate, out), latency=fabric.setup_s + steps * latency_s)


def point_to_point_s(job: Job) -> Sent:
    """Of one activation from a stage to the next: each tensor rank sends its part, and they gather it inside the host (Narayanan
    et al. 2021, section 4.1)."""
    if job.pipe == 1:
        return Sent()
    size = (4 if job.precision == "fp32" else 2) * job.tokens * job.width
    sent = _message(job, size / job.tensor, ring=False)
    return sent.plus(collective_s(job, "tensor", size, reduces=False))


def tied_s(job: Job, item: int) -> Sent:
    """Of the gradient of a tied embedding, which the first stage and the last both have, once a step."""
    if job.pipe == 1 or not job.tied:
        return Sent()
    return _message(job, item * job.embedding_parameters / job.tensor, ring=True)


def _message(job: Job, size: float, *, ring: bool) -> Sent:
    """Between two stages."""
    fabric = priors().fabric
    hosts, _ = job.place("pipe")
    if hosts == 1:
        return Sent(intra=fabric.setup_s + size / (job.intra_bytes_per_s * job.device.intra_part))
    share, latency_s = job.inter_bytes_per_s, job.latency_s
    if job.at_site("pipe"):
        share, latency_s = min(share, job.site_bytes_per_s), latency_s + job.site_latency_s
    part = fabric.part(share, job.per_host, ring=ring)
    return Sent(inter=size / (share * part), latency=fabric.setup_s + latency_s)
