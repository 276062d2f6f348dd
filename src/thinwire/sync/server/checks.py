"""What a push, a pace and the first weights must be like before anything of them is believed.

A server checks each of them BEFORE it keeps it, and a worker what it can before it sends. What is refused is refused in one line
to its sender alone, and has changed nothing for anybody else. Each function gives the reason to refuse it, or None. A push is
taken if

    values         as many as the server's range has, of the dtype in which it keeps them, all of them finite
    weight         finite, >= 0          0: an empty batch; it moves nothing
    local_steps    >= 1
    rate           not given, or finite and >= 0; 0 is a rate like any other
    version        of weights that the server has handed out: 0 <= version <= its own
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from thinwire.compress.base import finite
from thinwire.sync.server.flat import Span

if TYPE_CHECKING:
    from thinwire.sync.server.merger import Push


def push_error(push: "Push", held: Tensor, version: int) -> str | None:
    """held, version: the server's weights."""
    if push.values.dtype != held.dtype or push.values.shape != held.shape:
        pushed = f"{push.values.dtype} {tuple(push.values.shape)}"
        return f"a push of {pushed} where the server holds {held.numel()} values of {held.dtype}; all need one model"
    if error := push_numbers_error(push.weight, push.local_steps, push.learning_rate):
        return error
    if not 0 <= push.version <= version:
        return f"a push from version {push.version} of the weights where the server has made {version}; join again"
    if not finite(push.values):
        return "what is pushed is not finite; lower the learning rate, or look at the data"
    return None


def push_numbers_error(weight: float, local_steps: int, learning_rate: float | None) -> str | None:
    """What the worker can check too."""
    if not (math.isfinite(weight) and weight >= 0):
        return f"a push of {weight:g} samples or tokens; give a finite number, 0 for an empty batch"
    if local_steps < 1:
        return f"a push of {local_steps} local steps; push after 1 at least"
    if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate >= 0):
        return f"a learning rate of {learning_rate:g}; give a finite one, 0 to move nothing, None for the servers' own"
    return None


def pace_error(every: int, tokens_per_step: float) -> str | None:
    """Of what a worker wishes."""
    if not (math.isfinite(tokens_per_step) and tokens_per_step > 0):
        return f"tokens_per_step = {tokens_per_step:g}; pushes are weighed by it, so give a finite number above 0"
    if every < 0:
        return f"every = {every} local steps between pushes; give 1 or more, or 0 for what the servers say"
    return None


def initial_weights_error(values: Tensor, spans: Sequence[Span]) -> str | None:
    """Of the weights that a worker gives to servers without any: spans cover them in order, each value once, float64 last."""
    end, wide = 0, False
    for span in spans:
        if span.first != end or span.end <= span.first:
            return f"first weights whose spans leave a gap or overlap at value {end}"
        if wide and not span.wide:
            return f"first weights with float32 behind float64 at value {end}"
        end, wide = span.end, span.wide
    if end != values.numel():
        return f"first weights of {values.numel()} values whose spans cover {end}"
    return None if finite(values) else "the model's first weights are not finite; look at how it is initialised"
