"""What coding takes on this machine, timed once per codec: the fastest of a few tries."""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch

from thinwire.compress.base import Codec, TensorCodec

TRIED_VALUES, TRIES = 2**17, 4


@lru_cache(maxsize=256)
def seconds_per_value(codec: Codec) -> tuple[float, float]:
    """(encode, decode) of one value, in a vector of a bucket's size."""
    values = torch.linspace(-1, 1, max(1, TRIED_VALUES // codec.block) * codec.block)
    encode_s, decode_s = _timed(lambda: codec.encode(values), lambda payload: codec.decode(payload, values.numel()))
    return encode_s / values.numel(), decode_s / values.numel()


@lru_cache(maxsize=1024)
def seconds_of_tensor(codec: TensorCodec, shape: Sequence[int]) -> tuple[float, float]:
    """(encode, decode) of one tensor of this shape."""
    values = torch.linspace(-1, 1, prod(shape)).view(*shape)
    return _timed(lambda: codec.encode(values), lambda payload: codec.decode(payload, shape))


def _timed(encode: Callable[[], torch.Tensor], decode: Callable[[torch.Tensor], object]) -> tuple[float, float]:
    encoded, decoded = [], []
    for _ in range(TRIES):
        started = time.perf_counter()
        payload = encode()
        coded = time.perf_counter()
        decode(payload)
        encoded.append(coded - started)
        decoded.append(time.perf_counter() - coded)
    return min(encoded), min(decoded)
