"""The flat buffers of a `fully_shard` unit, and the bytes that its two collectives send.

FSDP2 cuts each parameter of a unit along dim 0 into p shards of equal length (p ranks; the last ones padded with zeros) and lays
shard s of all its parameters side by side as chunk s. With d_j rows of r_j values in parameter j:

    n_j = ceil(d_j / p) r_j          values of parameter j in every chunk;   chunk = sum_j n_j

Here a chunk travels as one row of bytes:   exact parts as they are | codes of the coded parts, each padded to whole blocks.
A row of gradients has one byte more at its end, which says whether they are finite.

    gradients    all-to-all, row s of rank i holds its chunk s for rank s               message p row bytes
    weights      all-gather of each rank's own row                                      message row bytes

On a mesh of two axes p is the number of shards, and the averaged chunk goes on to the other replicas (`replicas`). Where weights
are resharded to fewer ranks after the forward pass (hpZ of ZeRO++), the backward pass gathers them from k ranks, as they are:

    weights      all-gather of chunk p / k values of each rank                          message chunk p / k values
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch
from torch import Tensor

from thinwire.compress.base import Codec, padded, spoiled
from thinwire.compress.precision import wide
from thinwire.config.compress import EMBEDDINGS
from thinwire.traffic import Transfer
from thinwire.workload import ITEM_BYTES, Parameter

CODED_BLOCK = 256
"""Coded parameters are padded to a multiple of this, so that no block holds values of two. The blocks of the codecs divide it,
and those of int8, in which residuals are stored."""
ALIGNMENT = 4
"""Bytes: rows begin where float32 may begin, and where values of the buffer's dtype may."""
FLAG_BYTES = 1


@dataclass(frozen=True)
class UnitShape:
    """One unit as the planner knows it: names of parameters are those in the whole model.

    A complex parameter is one of real numbers, with a last dim of two. Buffers have the dtype of the parameters, if a policy of
    mixed precision does not say another.
    """

    name: str
    parameters: tuple[Parameter, ...]
    reshards: bool = True
    """Gathered again in the backward pass (reshard_after_forward)."""
    frozen: frozenset[str] = frozenset()
    """Names of parameters that have no gradient."""
    weights_dtype: str | None = None
    gradients_dtype: str | None = None
    secondary_ranks: int = 0
    """k, if the backward pass gathers from so many ranks only (reshard_after_forward = k)."""
    complex: frozenset[str] = frozenset()
    """Names of parameters whose last dim of two is that of real and imaginary parts."""

    def is_vector(self, parameter: Parameter) -> bool:
        """A complex vector is one too."""
        return len(parameter.shape) - (parameter.name in self.complex) < 2

    def item_bytes(self, dtype: str | None) -> int:
        """Of one value in a buffer for which a policy says `dtype`."""
        return ITEM_BYTES[dtype or self.parameters[0].dtype]


class Row:
    """How one chunk of a unit becomes a row of bytes. coded: one flag a parameter; without a codec, or on one rank, all
    is exact, and `codec` None."""

    def __init__(self, parameters: Sequence[Parameter], coded: Sequence[bool], codec: Codec | None, world_size: int) -> None:
        assert codec is None or CODED_BLOCK % codec.block == 0, f"blocks of {codec} do not fill {CODED_BLOCK} values"
        self.world_size, self.parameters = world_size, parameters
        self.lengths = [shard_length(parameter.shape, world_size) for parameter in parameters]
        self.flags = [flag and codec is not None and world_size > 1 for flag in coded]
        self.coded = [parameter for parameter, flag in zip(parameters, self.flags, strict=True) if flag]
        """The parameters that are, in the order of the buffer."""
        self.chunk = sum(self.lengths)
        """Values of one chunk."""
        pairs = list(zip(self.lengths, self.flags, strict=True))
        self.coded_values = sum(padded(length, CODED_BLOCK) for length, flag in pairs if flag)
        """Of one chunk, with what fills up the last block of each parameter."""
        self.exact_values = sum(length for length, flag in pairs if not flag)
        self.codec = codec if self.coded_values else None
        self.payload_bytes = self.codec.payload_bytes(self.coded_values) if self.codec else 0
        """Codes of one row."""

    def exact_bytes(self, itemsize: int) -> int:
        """Where the codes of a row begin."""
        return padded(self.exact_values * itemsize, ALIGNMENT)

    def row_bytes(self, itemsize: int = 4, *, flagged: bool = False) -> int:
        """itemsize: of a value in the unit's buffer. flagged: with a flag in its last byte."""
        if self.codec is None and not flagged:
            return self.exact_values * itemsize
        return padded(self.exact_bytes(itemsize) + self.payload_bytes + FLAG_BYTES * flagged, max(ALIGNMENT, itemsize))

    def take(self, chunks: Tensor, coded: bool) -> Tensor:
        """[k, chunk] -> the coded parts as float32, or float64 if they are [k, coded_values], or the exact ones as they are
        [k, exact_values]; `chunks` itself where all is exact."""
        if not coded and self.codec is None:
            return chunks
        if coded:
            found = chunks.new_zeros(chunks.shape[0], self.coded_values, dtype=wide(chunks.dtype))
        else:
            found = chunks.new_empty(chunks.shape[0], self.exact_values)
        for there, here in self._places(coded):
            found[:, here] = chunks[:, there]
        return found

    def put(self, chunks: Tensor, values: Tensor, coded: bool) -> None:
        """The reverse of `take`."""
        if not coded and self.codec is None:
            chunks.copy_(values)
            return
        for there, here in self._places(coded):
            chunks[:, there] = values[:, here]

    def not_finite(self, chunks: Tensor) -> tuple[list[str], Tensor]:
        """Names of the parameters, in the order of the buffer, and whether each is not, [parameters] bool. chunks: [k, chunk]."""
        parts = chunks.split(self.lengths, dim=1)
        return [parameter.name for parameter in self.parameters], torch.stack([spoiled(part) for part in parts])

    def _places(self, coded: bool) -> Iterator[tuple[slice, slice]]:
        """Where each coded (or exact) parameter lies in a chunk, and among its like."""
        there = here = 0
        for length, flag in zip(self.lengths, self.flags, strict=True):
            if flag is coded:
                yield slice(there, there + length), slice(here, here + length)
                here += padded(length, CODED_BLOCK) if coded else length
            there += length


def shard_length(shape: Sequence[int], world_size: int) -> int:
    """Values of one parameter in every chunk."""
    return -(-shape[0] // world_size) * math.prod(shape[1:])


def label_of(unit: str, what: str) -> str:
    """In the ledger. what: "gradients" or "weights"."""
    return f"unit {unit or 'root'} {what}"


@dataclass(frozen=True)
class Coding:
    """How each kind of message travels: `stock` leaves it to FSDP2; no codec: as it is, but through our collectives.

    Matrices are coded, vectors and what `exclude` names are not.
    """

    gradients: Codec | None
    weights: Codec | None
    stock_gradients: bool = False
    stock_weights: bool = False
    exclude: tuple[str, ...] = EMBEDDINGS

    def weights_row(self, unit: UnitShape, world_size: int) -> Row:
        """All parameters of the unit."""
        return self._row(unit, unit.parameters, self.weights, world_size)

    def gradients_row(self, unit: UnitShape, world_size: int) -> Row:
        """Those that have a gradient."""
        trained = [parameter for parameter in unit.parameters if parameter.name not in unit.frozen]
        return self._row(unit, trained, self.gradients, world_size)

    def _row(self, unit: UnitShape, parameters: Sequence[Parameter], codec: Codec | None, world_size: int) -> Row:
        coded = [
            not unit.is_vector(one) and not any(fnmatch(one.name, pattern) for pattern in self.exclude) for one in parameters
        ]
        return Row(parameters, coded, codec, world_size)


Across = Callable[[UnitShape], list[Transfer]]
"""What the averaged chunk of a unit sends to the other replicas."""


def sharded_transfers(
    units: Sequence[UnitShape],
    world_size: int,
    coding: Coding,
    axis: str = "world",
    micro_batches: int = 1,
    across: Across = lambda unit: [],
) -> list[Transfer]:
    """Everything that a step of `micro_batches` sends, gradients once. world_size: ranks that share one copy of the model.

    What is gathered from fewer ranks has the axis `secondary(axis)`.
    """
    found = []
    for unit in units:
        weights, size = coding.weights_row(unit, world_size), unit.item_bytes(unit.weights_dtype)
        again = unit.reshards and not unit.secondary_ranks
        calls = micro_batches * (2 if again else 1)
        label, message, item = label_of(unit.name, "weights"), weights.row_bytes(size), 1
        if coding.stock_weights:
            label, message, item = "", size * weights.chunk, size
        found.append(Transfer(label=label, axis=axis, op="all_gather", message_bytes=message, item_bytes=item, calls=calls))
        if unit.reshards and unit.secondary_ranks > 1:
            message = size * weights.chunk * world_size // unit.secondary_ranks
            shared = Transfer(label=label, axis=secondary(axis), op="all_gather", message_bytes=message, item_bytes=size)
            found.append(replace(shared, calls=micro_batches))
        gradients, size = coding.gradients_row(unit, world_size), unit.item_bytes(unit.gradients_dtype)
        if not gradients.chunk:
            continue
        label, op, item = label_of(unit.name, "gradients"), "all_to_all", 1
        message = world_size * gradients.row_bytes(size, flagged=True)
        if coding.stock_gradients:
            label, op, message, item = "", "reduce_scatter", world_size * gradients.chunk * size, size
        found.append(Transfer(label=label, axis=axis, op=op, message_bytes=message, item_bytes=item))
        found += across(unit)
    return found


def secondary(axis: str) -> str:
    """The axis along which k ranks hold a second copy of the weights."""
    return f"{axis} secondary"
