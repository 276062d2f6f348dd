"""The flat buffers of a `fully_shard` unit, and the bytes that its two collectives send.

FSDP2 cuts each parameter of a unit along dim 0 into p shards of equal length (p ranks; the last ones padded with zeros) and lays
shard s of all its parameters side by side as chunk s. With d_j rows of r_j values in parameter j:

    n_j = ceil(d_j / p) r_j          values of parameter j in every chunk;   chunk = sum_j n_j

Here a chunk travels as one row of bytes:   exact parts as they are | codes of the coded parts, each padded to whole blocks.

    gradients    all-to-all, row s of rank i holds its chunk s for rank s               message p row bytes
    weights      all-gather of each rank's own row                                      message row bytes
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from thinwire.compress.base import Codec, padded
from thinwire.config.compress import EXCLUDED
from thinwire.traffic import Transfer
from thinwire.workload import Parameter

CODED_BLOCK = 256
"""Coded parameters are padded to a multiple of this, so that no block holds values of two. The blocks of the codecs divide it,
and those of int8, in which residuals are stored."""
ALIGNMENT = 4
"""Bytes: rows begin where float32 may begin."""


@dataclass(frozen=True)
class UnitShape:
    """One unit as the planner knows it: names of parameters are those in the whole model."""

    name: str
    parameters: tuple[Parameter, ...]
    reshards: bool = True
    """Gathered again in the backward pass (reshard_after_forward)."""
    frozen: frozenset[str] = frozenset()
    """Names of parameters that have no gradient."""


class Row:
    """How one chunk of a unit becomes a row of bytes. coded: one flag a parameter; without a codec, or on one rank, all
    is exact, and `codec` None."""

    def __init__(self, parameters: Sequence[Parameter], coded: Sequence[bool], codec: Codec | None, world_size: int) -> None:
        assert codec is None or CODED_BLOCK % codec.block == 0, f"blocks of {codec} do not fill {CODED_BLOCK} values"
        self.world_size = world_size
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

    def row_bytes(self, itemsize: int = 4) -> int:
        """itemsize: of the unit's buffer, 4 unless a mixed precision policy changes it."""
        return self.exact_bytes(itemsize) + padded(self.payload_bytes, ALIGNMENT)

    def take(self, chunks: Tensor, coded: bool) -> Tensor:
        """[k, chunk] -> the coded parts as float32 [k, coded_values], or the exact ones as they are [k, exact_values]."""
        if coded:
            found = torch.zeros(chunks.shape[0], self.coded_values)
        else:
            found = torch.empty(chunks.shape[0], self.exact_values, dtype=chunks.dtype)
        for there, here in self._places(coded):
            found[:, here] = chunks[:, there]
        return found

    def put(self, chunks: Tensor, values: Tensor, coded: bool) -> None:
        """The reverse of `take`."""
        for there, here in self._places(coded):
            chunks[:, there] = values[:, here]

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
    exclude: tuple[str, ...] = EXCLUDED

    def weights_row(self, unit: UnitShape, world_size: int) -> Row:
        """All parameters of the unit."""
        return self._row(unit.parameters, self.weights, world_size)

    def gradients_row(self, unit: UnitShape, world_size: int) -> Row:
        """Those that have a gradient."""
        trained = [parameter for parameter in unit.parameters if parameter.name not in unit.frozen]
        return self._row(trained, self.gradients, world_size)

    def _row(self, parameters: Sequence[Parameter], codec: Codec | None, world_size: int) -> Row:
        coded = [len(one.shape) > 1 and not any(fnmatch(one.name, pattern) for pattern in self.exclude) for one in parameters]
        return Row(parameters, coded, codec, world_size)


def sharded_transfers(
    units: Sequence[UnitShape], world_size: int, coding: Coding, axis: str = "world", micro_batches: int = 1
) -> list[Transfer]:
    """Everything that a step of `micro_batches` sends, gradients once; buffers are float32."""
    found = []
    for unit in units:
        weights = coding.weights_row(unit, world_size)
        calls = micro_batches * (2 if unit.reshards else 1)
        if coding.stock_weights:
            found.append(Transfer(label="", axis=axis, op="all_gather", message_bytes=4 * weights.chunk, calls=calls))
        else:
            label, size = label_of(unit.name, "weights"), weights.row_bytes()
            found.append(Transfer(label=label, axis=axis, op="all_gather", message_bytes=size, item_bytes=1, calls=calls))
        gradients = coding.gradients_row(unit, world_size)
        if not gradients.chunk:
            continue
        if coding.stock_gradients:
            size = world_size * gradients.chunk * 4
            found.append(Transfer(label="", axis=axis, op="reduce_scatter", message_bytes=size))
        else:
            label, size = label_of(unit.name, "gradients"), world_size * gradients.row_bytes()
            found.append(Transfer(label=label, axis=axis, op="all_to_all", message_bytes=size, item_bytes=1))
    return found
