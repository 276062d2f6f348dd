"""What coding takes on a device of this machine, timed once per codec: the fastest of a few tries, of short ones of some more,
since another process may have had the processor in each of a few."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod

import torch

from thinwire.compress.base import Codec, Flat, TensorCodec
from thinwire.compress.precondition import scale_of

TRIED_VALUES, TRIES, MOST_TRIES, TRIED_S = 2**17, 3, 12, 0.005
CPU = torch.device("cpu")


def seconds_of_stages(run: Callable[[], Iterator[None]], device: torch.device = CPU) -> tuple[float, ...]:
    """Of each stage of what `run` makes, which yields at the end of each; on a device until that is through."""

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    tries: list[list[float]] = []
    first = now()
    while len(tries) < TRIES or (len(tries) < MOST_TRIES and time.perf_counter() - first < TRIED_S):
        times = [now()]
        times += [now() for _ in run()]
        tries.append([end - begin for begin, end in pairwise(times)])
    return tuple(min(stage) for stage in zip(*tries, strict=True))


@lru_cache(maxsize=256)
def seconds_per_value(codec: Codec, device: torch.device = CPU) -> tuple[float, float]:
    """(encode, decode) of one value, in a vector of a bucket's size."""
    numel = max(1, TRIED_VALUES // codec.block) * codec.block
    encode_s, decode_s = seconds_of_tensor(Flat(codec), (numel,), device)
    return encode_s / numel, decode_s / numel


@lru_cache(maxsize=1024)
def seconds_of_tensor(codec: TensorCodec, shape: Sequence[int], device: torch.device = CPU) -> tuple[float, float]:
    """(encode, decode) of one tensor of this shape."""
    values = torch.linspace(-1, 1, prod(shape), device=device).view(*shape)

    def run() -> Iterator[None]:
        payload = codec.encode(values)
        yield
        codec.decode(payload, shape)
        yield

    encode_s, decode_s = seconds_of_stages(run, device)
    return encode_s, decode_s


@lru_cache(maxsize=16)
def seconds_in_units(device: torch.device = CPU) -> float:
    """Of one value that is coded in units of second moments (`precondition`): s, and dividing and multiplying by it."""
    values, moments = torch.ones(TRIED_VALUES, device=device), torch.ones(TRIED_VALUES, device=device)

    def run() -> Iterator[None]:
        scale = scale_of(moments)
        values.div_(scale).mul_(scale).mul_(scale)
        yield

    return seconds_of_stages(run, device)[0] / TRIED_VALUES
