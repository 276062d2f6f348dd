"""Other people's 8-bit and 4-bit coders of a float32 vector, those that are installed."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """`encode` makes whatever `decode` takes."""

    name: str
    bits: int
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]


def find_peers() -> tuple[list[Peer], list[str]]:
    """Those that can run here, and the names of those that are not installed."""
    makers = {"torch": _torch, "torchao": _torchao, "bitsandbytes": _bitsandbytes, "hivemind": _hivemind}
    missing = [name for name in makers if importlib.util.find_spec(name) is None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [peer for name, make in makers.items() if name not in missing for peer in make()], missing


def _torch() -> list[Peer]:
    def one_scale(values: Tensor) -> Tensor:
        lowest, highest = torch.aminmax(values)
        return torch.quantize_per_tensor(values, float(torch.maximum(-lowest, highest)) / 127, 0, torch.qint8)

    def a_scale_each_256(values: Tensor) -> Tensor:
        rows = values.view(-1, 256)
        scales = rows.abs().amax(1) / 127
        return torch.quantize_per_channel(rows, scales, torch.zeros(len(scales), dtype=torch.int64), 0, torch.qint8)

    return [
        Peer("torch quantize_per_tensor", 8, one_scale, torch.dequantize),
        Peer("torch quantize_per_channel 256", 8, a_scale_each_256, torch.dequantize),
    ]


def _torchao() -> list[Peer]:
    from torchao.quantization import quant_primitives as primitives

    size = (1, 256)

    def encode(values: Tensor) -> Any:
        rows = values.view(-1, 256)
        scales, zeros = primitives.choose_qparams_affine(
            rows, primitives.MappingType.SYMMETRIC, size, torch.int8, eps=1e-30, scale_dtype=torch.float32
        )
        return primitives.quantize_affine(rows, size, scales, zeros, torch.int8), scales, zeros

    return [
        Peer(
            "torchao affine int8 256", 8, encode, lambda code: primitives.dequantize_affine(code[0], size, *code[1:], torch.int8)
        )
    ]


def _bitsandbytes() -> list[Peer]:
    from bitsandbytes import functional

    return [
        Peer(
            "bitsandbytes blockwise 256",
            8,
            lambda values: functional.quantize_blockwise(values, blocksize=256),
            lambda code: functional.dequantize_blockwise(*code),
        ),
        Peer(
            "bitsandbytes fp4 128",
            4,
            lambda values: functional.quantize_4bit(values, blocksize=128, quant_type="fp4"),
            lambda code: functional.dequantize_4bit(*code),
        ),
    ]


def _hivemind() -> list[Peer]:
    from hivemind import compression

    codec = compression.Uniform8BitQuantization()
    return [Peer("hivemind uniform 8 bit", 8, codec.compress, lambda code: compression.deserialize_torch_tensor(code))]
