"""Random vectors as gradients are, and worse: sizes over many decades, spikes, zeros."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from thinwire.compress.base import CODECS, Codec, make_codec

ALL = tuple(CODECS)
STABLE = tuple(kind for kind in ALL if kind != "codebook2")
"""Coding what was decoded gives the same again."""
BLOCKED = ("int8", "int4", "fp4", "sign", "ternary", "codebook2")


def short(cases: Iterable[tuple[Any, ...]], those: Callable[..., bool]) -> list[Any]:
    """Parameters of a test: `those` for which this is true in `make test`, the others in `make test-all` only."""
    return [case if those(*case) else pytest.param(*case, marks=pytest.mark.long) for case in cases]


def codec_of(kind: str, **options: Any) -> Codec:
    """By kind."""
    codec = make_codec(SimpleNamespace(kind=kind, **options))
    assert codec is not None
    return codec


def vector(numel: int, seed: int, scale: float = 1.0, shape: str = "normal") -> torch.Tensor:
    """[numel] float32."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    if shape == "decades":
        values *= 10.0 ** (torch.rand(numel, generator=generator) * 8 - 8)
    elif shape == "spikes":
        values *= 1 + 1000 * (torch.rand(numel, generator=generator) < 0.01)
    elif shape == "sparse":
        values *= torch.rand(numel, generator=generator) < 0.003
    elif shape == "equal":
        values = values.sign()
    elif shape == "shifted":
        values += 5
    return values * scale


SHAPES = ("normal", "decades", "spikes", "sparse", "equal", "shifted")
SCALES = (0.0, 1e-38, 1e-36, 1e-30, 1e-9, 1.0, 1e4, 1e30)
vectors = st.builds(
    lambda blocks, seed, scale, shape: lambda block: vector(blocks * block, seed, scale, shape),
    st.integers(0, 5),
    st.integers(0, 2**20),
    st.sampled_from(SCALES),
    st.sampled_from(SHAPES),
)
"""A function from the length of a block to a vector of some blocks."""
