"""Other people's coders of a float32 vector, of 16, 8 and 4 bits, those that are installed and can read their own codes.

hivemind's coders make a message of protobuf, which is part of what they are; its quantiles are found by a pool of threads.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

BLOCK = 256


@dataclass
class Coder:
    """`encode` makes whatever `decode` takes, of vectors that are multiples of `block`; peer_bits: of other people's.

    barred_bits: of one of ours that is held to be faster than all of those with so many.
    """

    case: str
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]
    peer_bits: int | None = None
    block: int = BLOCK
    barred_bits: int | None = None
    times: list[tuple[float, float, float]] = field(default_factory=list)
    """(copy, encode, decode) in seconds, for each turn."""

    def median_s(self, part: int) -> float:
        """Of copy (0), encode (1) or decode (2)."""
        return median(times[part] for times in self.times)


def find_peers() -> tuple[list[Coder], list[str]]:
    """Those that can run here, and of each other one its name and why it cannot."""
    makers = {"torch": _torch, "torchao": _torchao, "bitsandbytes": _bitsandbytes, "hivemind": _hivemind}
    found, reasons = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in makers.items():
            if importlib.util.find_spec(name) is None:
                reasons.append(f"{name}, not installed")
                continue
            for peer in make():
                reason = _broken(peer)
                if reason:
                    reasons.append(f"{peer.case}, broken here: {reason}")
                else:
                    found.append(peer)
    return found, reasons


def _broken(peer: Coder) -> str | None:
    """Why it does not read what it writes here, in one line; hivemind 1.1 with numpy 2.4 does not."""
    try:
        made = peer.decode(peer.encode(torch.linspace(-1, 1, 4096)))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None if made.numel() == 4096 else f"{made.numel()} values of 4096 come back"


def _torch() -> list[Coder]:
    def one_scale(values: Tensor) -> Tensor:
        lowest, highest = torch.aminmax(values)
        return torch.quantize_per_tensor(values, float(torch.maximum(-lowest, highest)) / 127, 0, torch.qint8)

    def a_scale_each_block(values: Tensor) -> Tensor:
        rows = values.view(-1, BLOCK)
        scales = rows.abs().amax(1) / 127
        return torch.quantize_per_channel(rows, scales, torch.zeros(len(scales), dtype=torch.int64), 0, torch.qint8)

    return [
        Coder("torch quantize_per_tensor", one_scale, torch.dequantize, 8),
        Coder(f"torch quantize_per_channel {BLOCK}", a_scale_each_block, torch.dequantize, 8),
    ]


def _torchao() -> list[Coder]:
    from torchao.quantization import quant_primitives as primitives

    size = (1, BLOCK)

    def encode(values: Tensor) -> Any:
        rows, symmetric = values.view(-1, BLOCK), primitives.MappingType.SYMMETRIC
        scales, zeros = primitives.choose_qparams_affine(rows, symmetric, size, torch.int8, eps=1e-30, scale_dtype=torch.float32)
        return primitives.quantize_affine(rows, size, scales, zeros, torch.int8), scales, zeros

    def decode(code: Any) -> Tensor:
        return primitives.dequantize_affine(code[0], size, *code[1:], torch.int8)

    return [Coder(f"torchao affine int8 {BLOCK}", encode, decode, 8)]


def _bitsandbytes() -> list[Coder]:
    from bitsandbytes import functional

    eight = partial(functional.quantize_blockwise, blocksize=BLOCK)
    four = partial(functional.quantize_4bit, blocksize=128, quant_type="fp4")
    return [
        Coder(f"bitsandbytes blockwise {BLOCK}", eight, lambda code: functional.dequantize_blockwise(*code), 8),
        Coder("bitsandbytes fp4 128", four, lambda code: functional.dequantize_4bit(*code), 4),
    ]


def _hivemind() -> list[Coder]:
    from hivemind import compression

    def peer(name: str, bits: int, codec: Any) -> Coder:
        def encode(values: Tensor) -> Any:
            return codec.compress(values, compression.CompressionInfo.from_tensor(values))

        return Coder(f"hivemind {name}", encode, codec.extract, bits)

    found = [
        peer("uniform 8 bit", 8, compression.Uniform8BitQuantization()),
        peer("quantile 8 bit", 8, compression.Quantile8BitQuantization()),
        peer("float16", 16, compression.Float16Compression()),
    ]
    if importlib.util.find_spec("bitsandbytes") is not None:
        found.append(peer("blockwise 8 bit", 8, compression.BlockwiseQuantization()))
    return found
