"""Lossless: the exponents of float32 or bf16 values in fewer bits, the rest as it is.

    bits of a value = sign 1 | exponent 8 | mantissa 7 (bf16) or 7 + 16 (float32)
    planes: exponents, one byte a value | sign and 7 bits, one byte | the low 16 bits, float32 only

Gradients are of a few sizes, so their exponents carry about 2.6 bits each and not 8, while signs and mantissas look drawn at
random. Each plane is coded by zlib, with Huffman codes alone or with runs, whichever makes a sample of it smaller, and stays as
it is where that saves less than a sixteenth: zeros, alone or in rows, cost little, and random bits cost no time. Every bit comes
back: payloads of nans, infinities, -0.0, subnormals. Same values, same bytes, with one version of zlib.

How long a payload is, is known only after coding. It says itself how to read it, and is even. Layout: five int64 (numel, bytes
of a value, length of each plane as it lies here), then the planes; one as long as the plain plane is plain.

It pays, where coding and sending follow each other, if bytes / link > bytes ratio / link + bytes / encoder + bytes / decoder:

    link_bps < 8 (1 - ratio) / (1 / encode_bytes_per_s + 1 / decode_bytes_per_s)

Measured on one core of a server: normal float32 to 0.831 at 420 and 650 MB/s, so it pays below 340 Mbit/s; normal bf16 to 0.662
at 225 and 350 MB/s, below 370 Mbit/s. Gradients of a transformer of 5 million parameters: its layers 0.846 (float32) and 0.692
(bf16), below 250 to 320 Mbit/s; its word embedding, most of whose rows are zero, 0.05, below 2 Gbit/s; all together 0.69 and
0.56, below 300 and 360 Mbit/s.

Hershcovitch et al. 2024 (ZipNN: exponents apart, Huffman codes alone), Deutsch 1996 (RFC 1951, deflate).
"""

import struct
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HEADER = struct.Struct("<5q")
_PIECE = 1 << 16
"""Values that stay in the processor's cache while they are taken apart."""
_SAMPLES, _SAMPLE_BYTES = 16, 2048

Words = NDArray[np.uint16]
Plane = NDArray[np.uint8]


class Lossless:
    """Exact, of variable size; for flat float32 or bf16."""

    def encode(self, values: Tensor) -> Tensor:
        """[numel] float32 or bf16, contiguous -> uint8, of an even length that depends on the values."""
        assert values.dtype in (torch.float32, torch.bfloat16) and values.dim() == 1 and values.is_contiguous(), (
            f"lossless coding takes a flat contiguous float32 or bf16 vector, not {values.dtype} of shape {tuple(values.shape)}"
        )
        words = values.detach().cpu().view(torch.int16).numpy().view(np.uint16)
        planes = [_squeeze(plane) for plane in _split(words, values.element_size() // 2)]
        lengths = [len(plane) for plane in planes] + [0] * (3 - len(planes))
        header = _HEADER.pack(values.numel(), values.element_size(), *lengths)
        payload = bytearray().join((header, *planes, bytes(sum(lengths) % 2)))
        return torch.frombuffer(payload, dtype=torch.uint8).to(values.device)

    def decode(self, payload: Tensor) -> Tensor:
        """What encode gave -> [numel] in the dtype that went in."""
        flat = payload.dtype == torch.uint8 and payload.dim() == 1 and payload.is_contiguous()
        assert flat, "a payload is flat contiguous uint8"
        code = payload.cpu().numpy()
        numel, value_bytes, *lengths = _HEADER.unpack(code[: _HEADER.size].tobytes())
        end = _HEADER.size + sum(lengths)
        assert payload.numel() == end + end % 2, f"a payload of {payload.numel()} bytes instead of {end + end % 2}"
        parts = np.split(code[_HEADER.size : end], np.cumsum(lengths)[:-1])
        plain_lengths = (numel, numel, 2 * numel) if value_bytes == 4 else (numel, numel)
        planes = [_unsqueeze(part, length) for part, length in zip(parts, plain_lengths, strict=False)]
        words = _join(planes, numel)
        if value_bytes == 4:
            return torch.from_numpy(words.view(np.float32)).to(payload.device)
        return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).to(payload.device)


def pays_below_bps(ratio: float, encode_bytes_per_s: float, decode_bytes_per_s: float) -> float:
    """The link rate below which coding saves time, 0 if nothing shrinks. Rates count bytes of values; ratio: payload / values."""
    return max(0.0, 8 * (1 - ratio) / (1 / encode_bytes_per_s + 1 / decode_bytes_per_s))


def _split(words: Words, each: int) -> list[Plane]:
    """[numel each] 16-bit words, the highest of each value last -> planes."""
    top = words[each - 1 :: each]
    exponents, mantissas = np.empty(len(top), np.uint8), np.empty(len(top), np.uint8)
    for first in range(0, len(top), _PIECE):
        piece = top[first : first + _PIECE].copy()
        np.copyto(exponents[first : first + _PIECE], piece >> 7, casting="unsafe")
        np.copyto(mantissas[first : first + _PIECE], (piece & 0x7F) | ((piece >> 8) & 0x80), casting="unsafe")
    return [exponents, mantissas] if each == 1 else [exponents, mantissas, words[0::2].copy().view(np.uint8)]


def _join(planes: list[Plane], numel: int) -> Words:
    """What `_split` split."""
    each = len(planes) - 1
    words = np.empty(numel * each, np.uint16)
    top = words[each - 1 :: each]
    for first in range(0, numel, _PIECE):
        piece = slice(first, first + _PIECE)
        mantissas = planes[1][piece].astype(np.uint16)
        top[piece] = (planes[0][piece].astype(np.uint16) << 7) | (mantissas & 0x7F) | ((mantissas & 0x80) << 8)
    if each == 2:
        words[0::2] = np.frombuffer(planes[2].tobytes(), np.uint16)
    return words


def _deflate(plane: Any, strategy: int) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, zlib.DEF_MEM_LEVEL, strategy)
    return coder.compress(plane) + coder.flush()


def _squeeze(plane: Plane) -> Any:
    """The plane, coded if that makes it smaller."""
    starts = np.linspace(0, max(0, len(plane) - _SAMPLE_BYTES), _SAMPLES).astype(int)
    if len(plane) <= _SAMPLES * _SAMPLE_BYTES:
        starts = starts[:1]
    sample = np.concatenate([plane[start : start + _SAMPLE_BYTES] for start in starts])
    lengths = {strategy: len(_deflate(sample, strategy)) for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)}
    best = min(lengths, key=lambda strategy: lengths[strategy])
    if lengths[best] * 16 > len(sample) * 15:
        return plane
    coded = _deflate(plane, best)
    return coded if len(coded) < len(plane) else plane


def _unsqueeze(code: Plane, length: int) -> Plane:
    """[length]"""
    if len(code) == length:
        return code
    plane = np.frombuffer(zlib.decompress(code.data, -15, max(1, length)), np.uint8)
    assert len(plane) == length, f"a plane of {len(plane)} bytes instead of {length}"
    return plane
