"""A trained model's weights in fewer bytes: low rank, few values, or few bits; each tensor as it is stored, and back to dense.

    low rank    W = U S V^T, of which the r largest singular values are kept, as U_r S_r^1/2 [m, r] and S_r^1/2 V_r^T [r, n] in
                float32; no matrix of rank r is nearer (Eckart & Young 1936), the squared error is the sum of the other s_i^2
    sparse      the largest |w| of each tensor, float32, and a bit per place that says where they lie
    blocks      int8 or int4 with a bf16 scale per block (`blockwise`)

Only matrices are shrunk; vectors (norms) stay float32, and so does a matrix whose parts would be larger than itself. Bytes are
those of the stored tensors: what a file holds besides its own index. Nothing is trained afterwards, so what is lost is lost;
`torchao_weights` trains with the rounding in place. Han et al. 2015 (magnitude pruning), Dettmers et al. 2022 (block-wise 8 bit).
"""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from thinwire.compress.base import Flat, finite
from thinwire.compress.codecs.blockwise import Int4, Int8
from thinwire.errors import UserError

FORMAT = "thinwire shrunk weights 1"

Kind = Literal["plain", "factors", "sparse", "int8", "int4"]


@dataclass(frozen=True)
class Stored:
    """One tensor as it is kept. parts: what is written, by what `kind` calls it."""

    kind: Kind
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def dense(self) -> Tensor:
        """Float32, of `shape`."""
        parts = self.parts
        if self.kind in _CODECS:
            return _CODECS[self.kind].decode(parts["payload"], self.shape)
        if self.kind == "factors":
            return (parts["left"] @ parts["right"]).view(self.shape)
        if self.kind == "plain":
            return parts["values"].view(self.shape)
        mask = unpack_bits(parts["bits"], prod(self.shape))
        return torch.zeros(mask.numel()).masked_scatter_(mask, parts["values"]).view(self.shape)


_CODECS: Mapping[str, Flat] = {"int8": Flat(Int8()), "int4": Flat(Int4())}
Method = Callable[[Tensor], Stored]
"""A float32 matrix (or tensor of more dims) -> what is kept of it."""


def plain(values: Tensor) -> Stored:
    """As it is."""
    return Stored("plain", tuple(values.shape), {"values": values.contiguous()})


@dataclass(frozen=True)
class LowRank:
    """Truncated singular values. rank: how many are kept if 1 or more and whole, else a fraction of the smaller side."""

    rank: float

    def __post_init__(self) -> None:
        if not (0 < self.rank < 1 or (self.rank >= 1 and float(self.rank).is_integer())):
            raise UserError(f"rank {self.rank:g}: give a whole number of singular values, or a fraction between 0 and 1")

    def __call__(self, values: Tensor) -> Stored:
        """Two factors where they are smaller than the matrix."""
        rows, columns = values.shape[0], values[0].numel()
        rank = int(self.rank) if self.rank >= 1 else max(1, round(self.rank * min(rows, columns)))
        if rank * (rows + columns) >= rows * columns:
            return plain(values)
        u, s, vt = torch.linalg.svd(values.reshape(rows, columns), full_matrices=False)
        root = s[:rank].sqrt()
        factors = {"left": u[:, :rank] * root, "right": root.unsqueeze(1) * vt[:rank]}
        return Stored("factors", tuple(values.shape), {name: factor.contiguous() for name, factor in factors.items()})


@dataclass(frozen=True)
class Sparse:
    """Magnitude pruning, tensor by tensor. sparsity: the fraction that becomes zero."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UserError(f"sparsity {self.sparsity:g}: give the fraction of zeros, between 0 and 1, e.g. 0.5")

    def __call__(self, values: Tensor) -> Stored:
        """The largest values and a bit for each place; as it is where that would be larger."""
        flat = values.reshape(-1)
        kept = flat.numel() - round(self.sparsity * flat.numel())
        places = flat.abs().topk(kept, sorted=False).indices
        mask = torch.zeros(flat.numel(), dtype=torch.bool).index_fill_(0, places, True)
        return smaller(Stored("sparse", tuple(values.shape), {"bits": pack_bits(mask), "values": flat[mask]}), values)


@dataclass(frozen=True)
class Blocks:
    """Whole numbers with a scale per block."""

    kind: Literal["int8", "int4"]

    def __call__(self, values: Tensor) -> Stored:
        """A payload of the codec, zeros behind the end; as it is where a matrix is too small to gain."""
        return smaller(Stored(self.kind, tuple(values.shape), {"payload": _CODECS[self.kind].encode(values)}), values)


def smaller(stored: Stored, values: Tensor) -> Stored:
    """`stored`, or the values as they are where it would not be smaller."""
    whole = plain(values)
    return stored if stored.num_bytes < whole.num_bytes else whole


def shrink(weights: Mapping[str, Tensor], method: Method) -> dict[str, Stored]:
    """All tensors of a model, the matrices by `method`. UserError for one that is not finite."""
    stored = {}
    for name, values in weights.items():
        values = values.detach().to("cpu", torch.float32)
        if not finite(values):
            raise UserError(f"{name} holds nan or inf: this model did not train well; take an earlier checkpoint")
        stored[name] = method(values) if values.dim() > 1 else plain(values)
    return stored


def stored_bytes(stored: Mapping[str, Stored]) -> int:
    """Of all tensors."""
    return sum(one.num_bytes for one in stored.values())


def save_shrunk(path: Path, stored: Mapping[str, Stored], about: str) -> None:
    """One file, which torch.load reads without running code. about: said in the file. UserError if it cannot be written."""
    tensors = {
        name: {
            "kind": one.kind,
            "shape": list(one.shape),
            "parts": {part: values.clone() for part, values in one.parts.items()},  # of a view the whole storage would be written
        }
        for name, one in stored.items()
    }
    try:
        with path.open("wb") as file:
            torch.save({"format": FORMAT, "about": about, "tensors": tensors}, file)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def load_shrunk(path: Path) -> dict[str, Tensor]:
    """Dense float32 weights by name, for `load_state_dict`. UserError if there is no such file, or it is another one."""
    try:
        content: Any = torch.load(path, weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no file of shrunk weights, or is damaged; make it with thinwire shrink RUN --out FILE")
    tensors = content["tensors"]
    return {name: Stored(one["kind"], tuple(one["shape"]), one["parts"]).dense() for name, one in tensors.items()}


def pack_bits(mask: Tensor) -> Tensor:
    """[n] bool -> [n / 8, rounded up] uint8, the first place in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """What `pack_bits` packed."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=numel, bitorder="little")).bool()
