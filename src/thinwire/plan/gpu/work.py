"""What one layer, and the head, ask of a device for one micro-batch: seconds of products, of elementwise kernels, launches.

A product of m x k and k x n is cut into tiles, which the multiprocessors work off in waves; one that is not full takes as long:

    seconds = min over tiles  ceil(tiles / units) * tile flops * (1 + k_half / k) / (rate / units * part of tile * part aligned)

and no less than its bytes take. Tokens T = b s / c, elements of two bytes. Forward, of one of t tensor ranks (Korthikanti et al.
2022 for what kernels read and write):

    products     (T, (a + 2 kv) d / t, h), (T, h, a d / t), (T, [2] F / t, h), (T, h, F / t), and the scores
    scores       plain: s x s x d twice for each head, none spared, and 9 a s / t bytes a token for softmax and dropout; fused:
                 half of the flops, at the part of the rate that the device reaches in it, no bytes
    elementwise  22 bytes a token and h (norms, residuals, dropout; divided by t under sequence parallelism),
                 (4 F + 8 h) / t of the activation and of what attention copies
    head         (T, V / t, h), 36 bytes a token and V / t (cast, softmax, loss and their gradients)
    backward     products twice, fused scores 2.5 times, elementwise 1.5 times; recomputed parts once more; and gradients of
                 weights added to those of earlier micro-batches: 6 bytes a parameter, 10 where they are summed in float32; none
                 from the Megatron on that brought sequence parallelism, which adds them within the product
"""

from __future__ import annotations

from functools import cache
from math import ceil, inf
from typing import NamedTuple

from thinwire.plan.gpu.job import Job
from thinwire.plan.gpu.priors import Device, priors

STREAM_BYTES = 22.0
SCORE_BYTES = 9.0
LOSS_BYTES = 36.0
BACKWARD_ELEMENTWISE = 1.5
FUSED_BACKWARD = 2.5
COMPILED = 0.6
"""Part of elementwise bytes that remains when a compiler fuses kernels, and of launches."""
EAGER = 2.0
"""Times what fused kernels move: Llama's norms, rotary embedding and gate as PyTorch's single kernels, partly in float32."""
LAUNCHES = 26.0
"""Kernels of a block, forward."""
ROUTED_BYTES, ROUTED_LAUNCHES = 16.0, 40.0
"""Of tokens on their way to experts and back: sorted, sent, unsorted, weighted; and kernels beside those of a dense block."""
EIGHT_BIT_BYTES = 5.0
"""A value that becomes fp8: read for its largest, read, written once each way."""


class Work(NamedTuple):
    """Of a pass, in seconds at the priors' rates."""

    products_s: float = 0.0
    memory_s: float = 0.0
    host_s: float = 0.0

    def plus(self, *others: Work) -> Work:
        """One after the other."""
        return Work(*map(sum, zip(self, *others, strict=True)))

    def times(self, factor: float) -> Work:
        """Each part that many times."""
        return Work(*(factor * value for value in self))


@cache
def product_s(device: Device, precision: str, m: float, n: float, k: float, batch: float = 1.0) -> float:
    """Seconds of `batch` products of (m, k) and (k, n). Precision that a device has not got runs in float32."""
    kernels, flops = priors().kernels, 2.0 * m * n * k * batch
    if flops <= 0:
        return 0.0
    rate = device.flops_per_s.get(precision, device.flops_per_s["fp16" if precision == "fp8" else "fp32"])
    rate *= min(_aligned(device, n), _aligned(device, k)) if precision != "fp32" else 1.0
    ideal = flops * (1 + kernels.k_half / k) / rate
    best = inf
    for rows, columns, part in kernels.tiles:
        count = ceil(m / rows) * ceil(n / columns) * batch
        waves = ceil(count / device.units) * device.units if device.units else count
        best = min(best, ideal * waves * rows * columns / (m * n * batch * part))
    moved = (2.0 if precision != "fp32" else 4.0) * batch * (m * k + k * n + m * n)
    return max(best if device.units else ideal, moved / (device.memory_bytes_per_s * kernels.memory_part))


def _aligned(device: Device, width: float) -> float:
    """Before A100 multiples of 8 are as good as any."""
    whole = int(width)
    largest = min(64, whole & -whole) if whole == width and whole > 0 else 1
    return priors().kernels.aligned[64 if device.generation == 0 and largest >= 8 else largest]


def scores(job: Job) -> Work:
    """Attention itself, forward, of one layer."""
    device, heads, head = job.device, job.heads / job.tensor, job.width / job.heads
    queries = job.sequence / job.seq
    if job.fused:
        flops = 2.0 * job.micro_batch * queries * job.sequence * heads * head  # half of 4 b s^2 a d
        rate = device.flops_per_s["fp16" if job.precision == "fp8" else job.precision]
        rate *= device.attention if job.zero == 3 else device.attention_best
        return Work(flops / rate * (1 + 16 / head), 0.0, _host(job, 2))
    batch = job.micro_batch * heads
    products = product_s(device, job.precision, queries, job.sequence, head, batch)
    products += product_s(device, job.precision, queries, head, job.sequence, batch)
    return Work(products, _moved(job, SCORE_BYTES * batch * queries * job.sequence), _host(job, 5))


def dense(job: Job) -> Work:
    """The other products of a layer, forward."""
    t, h, head = job.tensor, job.width, job.width / job.heads
    seconds = product_s(job.device, job.precision, job.tokens, (job.heads + 2 * job.kv_heads) * head / t, h)
    seconds += product_s(job.device, job.precision, job.tokens, h, h / t)
    rows, local = _expert_rows(job)
    seconds += product_s(job.device, job.precision, rows, job.hidden * (2 if job.gated else 1) / t, h, local)
    return last_product(job).plus(Work(seconds))


def last_product(job: Job) -> Work:
    """The second product of the MLP, forward."""
    rows, local = _expert_rows(job)
    return Work(product_s(job.device, job.precision, rows, job.width, job.hidden / job.tensor, local))


def _expert_rows(job: Job) -> tuple[float, float]:
    """(tokens of one local MLP, how many there are)."""
    if job.experts == 1:
        return job.tokens, 1.0
    return job.tokens * job.experts_per_token * job.expert / job.experts, max(1.0, job.experts / job.expert)


def elementwise(job: Job) -> Work:
    """Everything of a layer that is no product, forward."""
    t, h, tokens = job.tensor, job.width, job.tokens
    stream = STREAM_BYTES * h / (t if job.sequence_parallel else 1)
    inner = ((6.0 if job.gated else 4.0) * job.hidden * job.experts_per_token + 8.0 * h) / t
    if job.gated and job.zero == 3 and not job.compiled and job.precision != "fp8":
        stream, inner = stream * EAGER, inner * EAGER
    if job.precision == "fp8":
        inner += EIGHT_BIT_BYTES * (3 * h + job.hidden) / t
    launches = LAUNCHES + (8 if t > 1 else 0)
    if job.experts > 1:
        inner += ROUTED_BYTES * job.experts_per_token * h / t
        launches += ROUTED_LAUNCHES
    return Work(0.0, _moved(job, tokens * (stream + inner)), _host(job, launches))


def layer(job: Job) -> tuple[Work, Work]:
    """Forward and backward of one block and micro-batch, with what is computed again."""
    inside, products, rest = scores(job), dense(job), elementwise(job)
    forward = inside.plus(products, rest)
    inside_back = Work(inside.products_s * (FUSED_BACKWARD if job.fused else 2.0), inside.memory_s * 11 / 9, inside.host_s)
    backward = inside_back.plus(products.times(2), rest.times(BACKWARD_ELEMENTWISE))
    if job.recompute == "full":
        backward = backward.plus(forward)
        if job.fused and job.zero == 3:  # PyTorch's own checkpoints stop before the last product, which nothing needs again
            backward = backward.plus(last_product(job).times(-1))
    elif job.recompute == "selective":
        backward = backward.plus(*((products.times(0.5), rest) if job.fused and job.zero == 3 else (inside,)))
    if job.micro_batches > 1 and job.zero < 3 and not job.sequence_parallel:
        attention, experts = job.layer_parameters
        added = (attention + experts / job.expert) / job.tensor * (10 if job.wide_gradients else 6)
        backward = backward.plus(Work(0.0, added / (job.device.memory_bytes_per_s * priors().kernels.memory_part)))
    return forward, backward


def head(job: Job) -> Work:
    """Both passes of the last product and the loss."""
    columns = job.vocabulary / job.tensor
    products = product_s(job.device, "bf16" if job.precision == "fp8" else job.precision, job.tokens, columns, job.width)
    return Work(3 * products, _moved(job, LOSS_BYTES * job.tokens * columns), _host(job, 20))


def _moved(job: Job, moved_bytes: float) -> float:
    wide = 2.0 if job.precision == "fp32" else 1.0
    rate = job.device.memory_bytes_per_s * priors().kernels.memory_part
    return wide * moved_bytes * (COMPILED if job.compiled else 1.0) / rate


def _host(job: Job, launches: float) -> float:
    return launches * priors().kernels.host_s * (COMPILED if job.compiled else 1.0)
