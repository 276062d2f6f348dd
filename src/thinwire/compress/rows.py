"""Several vectors of one length coded at once, and into memory that is there already.

A codec may do this in fewer passes than vector by vector (`RowCodec`); for one that does not, the functions here do the same with
`encode` and `decode`, bit for bit. r: vectors, n: values of each. Rows of `payloads` may be longer than a payload.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from thinwire.compress.base import Codec


@runtime_checkable
class RowCodec(Protocol):
    """A codec with kernels for this."""

    def encode_rows(self, rows: Tensor, payloads: Tensor, *, lose: bool = False) -> None:
        """See `encode_rows`."""
        ...

    def decode_rows(self, payloads: Tensor, rows: Tensor) -> None:
        """See `decode_rows`."""
        ...

    def add_rows(self, payloads: Tensor, total: Tensor) -> None:
        """See `add_rows`."""
        ...


def encode_rows(codec: Codec, rows: Tensor, payloads: Tensor, *, lose: bool = False) -> None:
    """[r, n] float32 -> [r, payload_bytes or more] uint8. lose: leave in `rows` what is lost, rows - decoded."""
    if isinstance(codec, RowCodec):
        codec.encode_rows(rows, payloads, lose=lose)
        return
    size = codec.payload_bytes(rows.shape[1])
    for row, payload in zip(rows, payloads, strict=True):
        payload[:size] = codec.encode(row)
        if lose:
            row.sub_(codec.decode(payload[:size], row.numel()))


def decode_rows(codec: Codec, payloads: Tensor, rows: Tensor) -> None:
    """[r, payload_bytes or more] uint8 -> [r, n] float32, filled."""
    if isinstance(codec, RowCodec):
        codec.decode_rows(payloads, rows)
        return
    size = codec.payload_bytes(rows.shape[1])
    for row, payload in zip(rows, payloads, strict=True):
        row.copy_(codec.decode(payload[:size], row.numel()))


def add_rows(codec: Codec, payloads: Tensor, total: Tensor) -> None:
    """[r, payload_bytes or more] uint8 and [n] float32: each is decoded and added to `total`, in their order."""
    if isinstance(codec, RowCodec):
        codec.add_rows(payloads, total)
        return
    size = codec.payload_bytes(total.numel())
    for payload in payloads:
        total.add_(codec.decode(payload[:size], total.numel()))


def encode_with_error(codec: Codec, values: Tensor) -> tuple[Tensor, Tensor]:
    """[numel] -> encode(values), and values - decode(encode(values)). `values` stays as it is."""
    lost = values.clone()
    payload = torch.empty(codec.payload_bytes(values.numel()), dtype=torch.uint8, device=values.device)
    encode_rows(codec, lost.view(1, -1), payload.view(1, -1), lose=True)
    return payload, lost
