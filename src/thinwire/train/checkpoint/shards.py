"""Parameters of which each rank of the tensor or the shard axis, or of both, holds a part: how a checkpoint says which, and how
any parts are made of any others.

A parameter that `Shards` do not name is whole. What is flat, such as a residual, is of the local tensor, row behind row.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thinwire.parallel.tensor_parts import Part
from thinwire.parallel.tensor_state import copy_common

Shards = Mapping[str, Part]
"""By name of the parameter."""


def to_plain(shards: Shards, names: Iterable[str]) -> dict[str, Any]:
    """Of these parameters, for a file."""
    return {name: _plain(part) for name in names if (part := shards.get(name)) is not None}


def from_plain(saved: Mapping[str, Any]) -> dict[str, Part]:
    """What a file of a rank or of a part says; nothing in those that hold whole parameters."""
    return {name: _part(*plain) for name, plain in saved.get("shards", {}).items()}


def _plain(part: Part) -> list[Any]:
    across = [] if part.across is None else [_plain(part.across)]
    return [part.dim, [[one.start, one.stop] for one in part.ranges], part.whole, part.padding, *across]


def _part(dim: int, ranges: Sequence[Sequence[int]], whole: int, padding: int, across: Sequence[Any] | None = None) -> Part:
    return Part(dim, tuple(range(*ends) for ends in ranges), whole, padding, None if across is None else _part(*across))


def both_parts(name: str, mine: Shards, its: Shards) -> tuple[Part, Part] | None:
    """Of one parameter; None where it is whole in both."""
    my, other = mine.get(name), its.get(name)
    if my is None:
        return None if other is None else (other.everything, other)
    return my, other or my.everything


@dataclass(frozen=True)
class Refit:
    """States of synchronisers to this rank's parts (`sync.joined.Fit`). shapes: of its local parameters; theirs: by state."""

    mine: Shards
    shapes: Mapping[str, Sequence[int]]
    theirs: Sequence[Shards]

    def same(self, name: str, numbers: Collection[int]) -> int | None:
        return next((number for number in numbers if self.theirs[number].get(name) == self.mine.get(name)), None)

    def flat(self, name: str, values: Mapping[int, Tensor]) -> Tensor | None:
        shape, result = self.shapes[name], None
        for number, value in values.items():
            both = both_parts(name, self.mine, self.theirs[number])
            assert both is not None, "of the same part it is taken as it is"
            my, its = both
            local = value.view(its.local_shape(my.whole_shape(shape)))
            if result is None:
                result = value.new_zeros(tuple(shape))
            copy_common(result, my, local, its)
        return None if result is None else result.view(-1)
