"""Rows coded at once: the same bytes, losses and sums as vector by vector, fused or not."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import ALL, codec_of, vector

from thinwire.compress.codecs.blocked import PIECE
from thinwire.compress.codecs.blockwise import Int4, Int8
from thinwire.compress.codecs.fused import fused_or_reason

SPARE = 12
"""Bytes behind each payload that must stay what they are."""


def check(codec: Any, rows: torch.Tensor) -> None:
    """Against encode and decode, which know nothing of rows."""
    r, n = rows.shape
    size = codec.payload_bytes(n)
    codes = [codec.encode(row) for row in rows]
    decoded = [codec.decode(code, n) for code in codes]
    for subtract in (False, True):
        payloads, left = torch.full((r, size + SPARE), 7, dtype=torch.uint8), rows.clone()
        codec.encode_rows(left, payloads, subtract=subtract)
        assert torch.equal(payloads[:, :size], torch.stack(codes)) and bool((payloads[:, size:] == 7).all())
        assert torch.equal(left, rows - torch.stack(decoded) if subtract else rows)
    back = torch.empty_like(rows)
    codec.decode_rows(payloads, back)
    assert torch.equal(back, torch.stack(decoded))
    total = rows[0].clone()
    wanted = rows[0].clone()
    for part in decoded:
        wanted += part
    codec.add_rows(payloads, total)
    assert torch.equal(total, wanted)


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=10)
@given(r=st.integers(1, 6), blocks=st.integers(0, 4), seed=st.integers(0, 99))
def test_rows_are_coded_as_vectors_are(kind: str, r: int, blocks: int, seed: int) -> None:
    codec = codec_of(kind)
    check(codec, vector(r * blocks * codec.block, seed).view(r, blocks * codec.block))


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=repr)
def test_rows_longer_than_a_piece(codec: Any) -> None:
    check(codec, vector(2 * (PIECE + codec.block), 3).view(2, -1))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_fused_rows() -> None:
    """Also of one block each, which is not fused, and more than are added up at a time."""
    if (reason := fused_or_reason()) is not None:
        pytest.skip(reason)
    codec, fused = Int4(), Int4(fused=True)
    for r, blocks in ((3, 5), (2, 1), (7, 40)):
        rows = vector(r * blocks * codec.block, r).view(r, -1)
        check(fused, rows)
        both = [torch.empty(r, codec.payload_bytes(rows.shape[1]), dtype=torch.uint8) for _ in range(2)]
        for one, payloads in zip((codec, fused), both, strict=True):
            one.encode_rows(rows, payloads)
        assert torch.equal(*both)
        decoded = [torch.empty_like(rows) for _ in both]
        for one, values in zip((codec, fused), decoded, strict=True):
            one.decode_rows(both[0], values)
        assert torch.equal(*decoded)
