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
from thinwire.plan.gpu.work import head, layer

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

    f_, b_: of one layer's passes for a micro-batch: products, elementwise kernels, launches; head_: of both passes of the head;
    intra, inter: sent between products, inside hosts and between them; shard_: of ZeRO-3. fullest: most layers of a stage but the
    last; handed_: what a stage hands on, both ways; behind: 1 where gradients are sent after the passes.
    """

    f_products: float
    f_memory: float
    f_host: float
    b_products: float
    b_memory: float
    b_host: float
    head_products: float
    head_memory: float
    head_host: float
    f_intra: float
    f_inter: float
    f_latency: float
    b_intra: float
    b_inter: float
    b_latency: float
    f_shard_intra: float
    f_shard_inter: float
    f_shard_latency: float
    b_shard_intra: float
    b_shard_inter: float
    b_shard_latency: float
    layers: float
    last: float
    fullest: float
    pipe: float
    micro_batches: float
    bubble: float
    handed_intra: float
    handed_inter: float
    handed_latency: float
    data_intra: float
    data_inter: float
    data_latency: float
    behind: float
    replicas: float
    optimizer: float
    offload: float
    torch: float


def columns(rows: Sequence[Terms]) -> Terms:
    """Of many steps, each field a vector."""
    return Terms(*np.array(rows, dtype=np.float64).T)


def seconds(terms: Terms, factors: Factors = Factors()) -> Any:  # noqa: B008 - never changed
    """Of a step, or of each of many."""
    t, x = terms, factors
    forward = _pass(x, t.f_products, t.f_memory, t.f_host) + _sent(x, t.f_intra, t.f_inter, t.f_latency)
    backward = _pass(x, t.b_products, t.b_memory, t.b_host) + _sent(x, t.b_intra, t.b_inter, t.b_latency)
    forward = forward + _seen(_sent(x, t.f_shard_intra, t.f_shard_inter, t.f_shard_latency), forward)
    backward = backward + _seen(_sent(x, t.b_shard_intra, t.b_shard_inter, t.b_shard_latency), backward)
    head = _pass(x, t.head_products, t.head_memory, t.head_host)
    handed = _sent(x, t.handed_intra, t.handed_inter, t.handed_latency)
    last = t.last * (forward + backward) + head + handed
    slowest = np.maximum(last, t.fullest * (forward + backward) + handed)
    total = t.layers * (forward + backward) + head + t.pipe * handed
    passes = t.micro_batches * slowest + t.bubble * (total - slowest)
    passes = passes * (1 + LATE * np.sqrt(2 * np.log(t.replicas)))
    data = _sent(x, t.data_intra, t.data_inter, t.data_latency)
    data = np.where(t.behind > 0, data, _seen(data, t.layers * backward))
    return x.rest * np.where(t.torch > 0, x.torch, 1.0) * (passes + data + t.optimizer * x.memory + t.offload)


def _sent(factors: Factors, intra: float, inter: float, latency: float) -> Any:
    return intra * factors.intra + inter * factors.inter + latency * factors.latency


def _pass(factors: Factors, products: float, memory: float, host: float) -> Any:
    """The device's time or the host's, whichever is longer; where they are near, somewhat more than either."""
    device = products * factors.products + memory * factors.memory
    return (device**6 + (host * factors.host) ** 6) ** (1 / 6)


def _seen(sent: Any, computing: Any) -> Any:
    """What communication adds to computing that it may run under."""
    under = OVERLAP * computing
    return np.maximum(0.0, sent - under) + SLOWED * np.minimum(sent, under)


def bubble_part(job: Job) -> float:
    """beta of the top."""
    name = job.schedule.lower().replace("_", "-")
    table = {"zb-1p": 1 / 3, "zb-h1": 1 / 3, "interleavedzerobubble": 1 / (3 * job.interleave), "v-half": 0.5, "v-min": 2 / 3}
    if name in table:
        return table[name]
    if name in ("zb-2p", "zb-h2", "zbv", "zbvzerobubble", "dualpipe", "dualpipev"):
        return 0.0
    return 1 / job.interleave


def terms(job: Job) -> Terms:
    """What a step of the job is made of."""
    item = 4 if job.precision == "fp32" else 2
    forward, backward = layer(job)
    end = head(job)
    gather = _gather(job, item)
    within = _within(job)
    again = 2.0 if job.recompute == "full" else 1.0
    again += 0.5 if job.sequence_parallel else 0.0  # gathers its input once more for the gradient of weights (Korthikanti et al.)
    local = job.local_parameters / (job.data * job.seq if job.zero else 1)
    stages = job.stage_layers
    return Terms(
        *(forward.products_s, forward.memory_s, forward.host_s),
        *(backward.products_s, backward.memory_s, backward.host_s),
        *(end.products_s, end.memory_s, end.host_s),
        *(*within, *within.times(again), *gather, *gather.times(2)),
        sum(stages),
        stages[-1],
        max(stages[:-1], default=0),
        job.pipe,
        job.micro_batches,
        bubble_part(job),
        *(*point_to_point_s(job).times(2 * job.interleave), *_gradients(job, item).plus(tied_s(job, item))),
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
