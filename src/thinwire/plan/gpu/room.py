"""Bytes of the fullest device, of a step on accelerators.

States: weights w, gradients g, optimizer o bytes a parameter. Mixed precision with Adam: w = 2, g = 2, o = 12 (weights and two
moments in float32) and 4 while float16 gradients become float32; summed in float32, g = 4, and before H100 2 of the sixteen bits
beside. ZeRO-1 divides o by d, ZeRO-2 also g, ZeRO-3 also w, with two layers gathered (Rajbhandari et al. 2020); ranks of the seq
axis share with those of data.

Activations of one layer and micro-batch, T = s b / c tokens, x = 1 / t under sequence parallelism, else 1:

    plain         T h (10 + 24/t + 5 a s / (h t)); sequence parallel (34 + 5 a s / h) / t; selective: without 5 a s / h;
                  full: 2 x, and one layer as a whole while it is computed again (Korthikanti et al. 2022, table 2)
    fused         T (8 x h + (4 + 4 g) h / t + 4 F / t), gated 8 F / t: no dropout, no scores, g = kv_heads / heads; of
                  PyTorch's selective checkpoints about half

A stage i of n_i layers keeps n_i (p - i) of them under 1f1b, times 1 + (p - 1) / (p v) interleaved and 2 for zb-2p, n_i m at most
and for gpipe. Logits: 10 bytes a value where they become float32, 6 beside fused losses, on the last stage. Reserve: program,
libraries, buffers of collectives and what the allocator cannot use.
"""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.plan.gpu.job import Job
from thinwire.plan.gpu.priors import GIB

FITS = 0.97
"""Part of a device's memory under which a predicted peak is said to fit; of a host's too."""
RESERVE_BYTES = 2.0 * GIB
RESERVE_PART = 0.04
"""Of the device's memory; together 5 GiB of 80, as Sailor's authors take it (Strati et al. 2025)."""
BUCKETS_BYTES = 2 * 5e8 * 2
"""DeepSpeed's two buckets of 5e8 values, by its defaults."""
FRAGMENTS = 1.05
"""Megatron's own estimate adds as much to what comes and goes."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """In bytes."""

    states: float
    activations: float
    logits: float
    reserve: float

    @property
    def total(self) -> float:
        """The peak."""
        return self.states + FRAGMENTS * (self.activations + self.logits) + self.reserve


def layer_activation_bytes(job: Job) -> float:
    """Of one layer and micro-batch, as kept for the backward pass."""
    tokens, t, h = job.tokens, job.tensor, job.width
    item = 2.0 if job.precision == "fp32" else 1.0
    if job.recompute == "full":
        return item * 2 * tokens * h / (t if job.sequence_parallel else 1)
    half = 0.5 if job.fused and job.recompute == "selective" and job.zero == 3 else 1.0
    return half * item * tokens * _whole(job, scores=job.recompute != "selective")


def _whole(job: Job, *, scores: bool) -> float:
    """Bytes a token, of one layer of which nothing is dropped but the scores."""
    t, h = job.tensor, job.width
    if job.fused:
        inner = (4 + 4 * job.kv_heads / job.heads) * h + (8 if job.gated else 4) * job.hidden * job.experts_per_token
        return 8 * h / (t if job.sequence_parallel else 1) + inner / t
    kept = 5 * job.heads * job.sequence / (h * t) if scores else 0.0
    return h * ((34 / t if job.sequence_parallel else 10 + 24 / t) + kept)


def kept_passes(job: Job) -> list[float]:
    """Of each stage: layers times micro-batches whose activations it keeps at the most."""
    p, v, m = job.pipe, job.interleave, job.micro_batches
    name = job.schedule.lower()
    more = (1 + (p - 1) / (p * v) if v > 1 else 1.0) * (2 if name in ("zb-2p", "zb-h2") else 1)
    if "gpipe" in name:
        more = m * p
    return [min(n * max(1.0, (p - i) * more), n * m) for i, n in enumerate(job.stage_layers)]


def room(job: Job) -> Room:
    """Of the fullest device."""
    each, item = _state_bytes(job), 4 if job.precision == "fp32" else 2
    attention, experts = job.layer_parameters
    block = (attention + experts / job.expert) / job.tensor
    reserve = RESERVE_BYTES + RESERVE_PART * job.device.memory_bytes
    if job.zero in (1, 2) and job.device.generation < 2:
        reserve += BUCKETS_BYTES
    once = job.tokens * _whole(job, scores=True) if job.recompute == "full" else 0.0
    one = layer_activation_bytes(job) * (0.2 if "activ" in job.offload else 1)
    gathered = 2 * item * block if job.zero == 3 else 0.0
    last = job.pipe - 1
    stages = []
    for stage, (layers, passes) in enumerate(zip(job.stage_layers, kept_passes(job), strict=True)):
        ends = (stage == 0) + (stage == last and not (job.tied and last == 0))
        parameters = layers * block + ends * job.embedding_parameters / job.tensor
        logits = job.tokens * job.vocabulary / job.tensor * (6 if job.fused else 10) if stage == last else 0.0
        states = parameters * each + gathered
        stages.append(Room(states=states, activations=passes * one + once, logits=logits, reserve=reserve))
    return max(stages, key=lambda need: need.total)


def _state_bytes(job: Job) -> float:
    """Of a parameter on its rank."""
    item, d = 4 if job.precision == "fp32" else 2, job.data * job.seq
    wide = 4 + item if job.device.generation < 2 else 4
    gradients = wide if job.wide_gradients else item
    optimizer = 0 if "optim" in job.offload else (8 if item == 4 else 12) + (0 if job.wide_gradients or item == 4 else 4)
    if job.zero == 3 and job.pipe > 1:  # weights stay gathered and gradients whole while micro-batches pass
        return item + 4 + (optimizer + gradients) / d
    weights = item / (d if job.zero == 3 else 1)
    return weights + gradients / (d if job.zero >= 2 else 1) + optimizer / (d if job.zero else 1)
