"""Seconds of a step, from work and links, as a function of a few factors that a calibration may change.

    pass       the device's time, or the host's where it launches too slowly; then what the tensor, seq and expert axes send
    stage t_i  layers of stage i: forward and backward of one micro-batch; the last one's with the head; and what it hands on
    passes     m t_max + beta (sum of t_i - t_max)       beta = 1 for gpipe and 1f1b (the bubble is (p - 1) / m of equal stages),
               1 / v interleaved, 1/3 zb-1p (Qi et al. 2024, T_F = T_B = T_W), 0 zb-2p, zbv, dualpipe; 1/2 v-half, 2/3 v-min
    sharded    ZeRO-3 gathers weights for both passes and scatters gradients, micro-batch by micro-batch, under the computing of
               the next layer: max(0, c - kappa t) + gamma min(c, kappa t) of c seconds is seen. DeepSpeed's first (of float16
               days) gathered slowly whatever the links
    data       gradients of all micro-batches, once: under the last backward pass without a pipeline, and with one in Megatron of
               H100 days (its README: gradients, and what tensor ranks send, overlap); else after it
    waiting    for the slowest of d replicas, each late by a normal share sigma of its step: sigma sqrt(2 ln d)
    optimizer  bytes that it touches / memory rate

Factors multiply seconds of their kind: products, memory, host, intra (links inside hosts), inter and latency (between them);
torch: steps of PyTorch modules under FSDP, beside those of fused Megatron kernels; rest: all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from thinwire.plan.gpu.job import Job
from thinwire.plan.gpu.links import Sent, collective_s, point_to_point_s, tied_s
from thinwire.plan.gpu.priors import priors
from thinwire.plan.gpu.work import Work, head, layer

OVERLAP = 0.8
"""kappa: part of the computing under which communication fits."""
SLOWED = 0.15
"""gamma: what communication that is hidden costs the computing, as a part of itself."""
LATE = 0.013
"""sigma: with it and the links' part, eight replicas add to the step of the 530B model what Korthikanti et al. 2022 found
(section 6.3: 1.32 s to 37.83 s)."""
TOUCHED_BYTES = 60.0
"""Of a parameter in mixed precision: gradient cast (6), unscaled (8), normed (4) and clipped (8), Adam (28), weights cast (6)."""
HOST_LINK_BYTES_PER_S = 20e9
"""Between a device and its host's memory."""
HIDDEN_TENSOR = 0.5
"""Part of the tensor axis' communication that still shows where products are cut so that it hides under them."""


class Factors(NamedTuple):
    """Of seconds of each kind; 1: as the priors say."""

    products: float = 1.0
    memory: float = 1.0
    host: float = 1.0
    intra: float = 1.0
    inter: float = 1.0
    latency: float = 1.0
    torch: float = 1.0
    rest: float = 1.0


class Terms(NamedTuple):
    """Parts of a step at the priors' rates: numbers of one step, or columns of many (`columns`), so that a fit is quick.

    forward, backward: of one layer's passes for a micro-batch, and what is sent between their products, and for them of ZeRO-3's
    shards; head: of both passes of the head. fullest: most layers of a stage but the last; handed: what a stage hands on, both
    ways; data: of gradients; behind: 1 where these are sent after the passes.
    """

    forward: Work
    backward: Work
    head: Work
    forward_sent: Sent
    backward_sent: Sent
    forward_shards: Sent
    backward_shards: Sent
    handed: Sent
    data: Sent
    layers: float
    last: float
    fullest: float
    pipe: float
    micro_batches: float
    bubble: float
    behind: float
    replicas: float
    optimizer: float
    offload: float
    torch: float


def columns(rows: Sequence[Terms]) -> Terms:
    """Of many steps, each field a vector."""
    together: list[Any] = []
    for values in zip(*rows, strict=True):
        column = np.array(values, dtype=np.float64).T
        together.append(column if column.ndim == 1 else type(values[0])(*column))
    return Terms(*together)


def seconds(terms: Terms, factors: Factors = Factors()) -> Any:  # noqa: B008 - never changed
    """Of a step, or of each of many."""
    t, x = terms, factors
    forward, backward = _pass(x, t.forward) + _sent(x, t.forward_sent), _pass(x, t.backward) + _sent(x, t.backward_sent)
    forward = forward + _seen(_sent(x, t.forward_shards), forward)
    backward = backward + _seen(_sent(x, t.backward_shards), backward)
    head, handed = _pass(x, t.head), _sent(x, t.handed)
    last = t.last * (forward + backward) + head + handed
    slowest = np.maximum(last, t.fullest * (forward + backward) + handed)
    total = t.layers * (forward + backward) + head + t.pipe * handed
    passes = t.micro_batches * slowest + t.bubble * (total - slowest)
    passes = passes * (1 + LATE * np.sqrt(2 * np.log(t.replicas)))
    data = _sent(x, t.data)
    data = np.where(t.behind > 0, data, _seen(data, t.layers * backward))
    return x.rest * np.where(t.torch > 0, x.torch, 1.0) * (passes + data + t.optimizer * x.memory + t.offload)


def _sent(factors: Factors, sent: Sent) -> Any:
    return sent.intra * factors.intra + sent.inter * factors.inter + sent.latency * factors.latency


def _pass(factors: Factors, work: Work) -> Any:
    """The device's time or the host's, whichever is longer; where they are near, somewhat more than either."""
    device = work.products_s * factors.products + work.memory_s * factors.memory
    return (device**6 + (work.host_s * factors.host) ** 6) ** (1 / 6)


def _seen(sent: Any, computing: Any) -> Any:
    """What communication adds to computing that it may run under."""
    under = OVERLAP * computing
    return np.maximum(0.0, sent - under) + SLOWED * np.minimum(sent, under)


def bubble_part(schedule: str, interleave: int) -> float:
    """beta of the top."""
    name = schedule.lower().replace("_", "-").replace("zb1p", "zb-1p")
    table = {"zb-1p": 1 / 3, "zb-h1": 1 / 3, "interleavedzerobubble": 1 / (3 * interleave), "v-half": 0.5, "v-min": 2 / 3}
    none = dict.fromkeys(("zb-2p", "zb-h2", "zbv", "zbvzerobubble", "dualpipe", "dualpipev"), 0.0)
    return (table | none).get(name, 1 / interleave)


def terms(job: Job) -> Terms:
    """What a step of the job is made of."""
    item = 4 if job.precision == "fp32" else 2
    forward, backward = layer(job)
    gather = _gather(job, item)
    within = _within(job)
    again = 2.0 if job.recompute == "full" else 1.0
    again += 0.5 if job.sequence_parallel else 0.0  # gathers its input once more for the gradient of weights (Korthikanti et al.)
    local = job.local_parameters / (job.data * job.seq if job.zero else 1)
    stages = job.stage_layers
    return Terms(
        forward=forward,
        backward=backward,
        head=head(job),
        forward_sent=within,
        backward_sent=within.times(again),
        forward_shards=gather,
        backward_shards=gather.times(2),
        handed=point_to_point_s(job).times(2 * job.interleave),
        data=_gradients(job, item).plus(tied_s(job, item)),
        layers=sum(stages),
        last=stages[-1],
        fullest=max(stages[:-1], default=0),
        pipe=job.pipe,
        micro_batches=job.micro_batches,
        bubble=bubble_part(job.schedule, job.interleave),
        behind=job.pipe > 1 and job.device.generation < 2,
        replicas=job.data,
        optimizer=local * TOUCHED_BYTES / (job.device.memory_bytes_per_s * priors().kernels.memory_part),
        torch=job.zero == 3 and job.fused,
        offload=local * 12 / HOST_LINK_BYTES_PER_S if "optim" in job.offload else 0.0,
    )


def _gather(job: Job, item: int) -> Sent:
    """Of one layer's weights, once, under ZeRO-3."""
    ranks = job.data * job.seq
    if job.zero < 3 or ranks == 1:
        return Sent()
    attention, experts = job.layer_parameters
    size = item * (attention + experts / job.expert) / job.tensor
    gather = collective_s(job, "shards", size, reduces=False)
    slowly = size * (ranks - 1) / ranks / (1e9 * priors().fabric.first_zero3_gbytes)
    if job.precision == "fp16" and slowly > sum(gather):
        gather = Sent(intra=slowly)
    return gather.times(1 / job.micro_batches if job.pipe > 1 else 1.0)  # beside a pipeline weights stay gathered


def _within(job: Job) -> Sent:
    """What a layer's forward pass sends along tensor, seq and expert."""
    item = 4 if job.precision == "fp32" else 2
    activation = item * job.tokens * job.width
    seen = HIDDEN_TENSOR if job.hidden_tensor else 1.0
    sent = collective_s(job, "tensor", activation, reduces=True).times(2 * seen)
    keys = 2 * activation * job.seq * job.kv_heads / job.heads / job.tensor
    sent = sent.plus(collective_s(job, "seq", keys, reduces=False))
    if job.experts > 1:
        spread = activation / job.tensor * job.experts_per_token
        sent = sent.plus(collective_s(job, "expert", spread, reduces=False).times(2))
    return sent


def _gradients(job: Job, item: int) -> Sent:
    """Of the data axis, once a step; with ZeRO-3 only what the blocks do not send: the embeddings."""
    wide = 4 if job.wide_gradients else item
    if job.zero == 3:
        ends = item * job.embedding_parameters / job.tensor * (1 if job.tied else 2)
        return collective_s(job, "shards", ends, reduces=False).times(3 * job.micro_batches)
    if job.zero:
        scattered = collective_s(job, "data", wide * job.local_parameters, reduces=False)
        return scattered.plus(collective_s(job, "data", item * job.local_parameters, reduces=False))
    return collective_s(job, "data", wide * job.local_parameters, reduces=True)
