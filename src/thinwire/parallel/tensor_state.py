"""States of a model that is split over tensor ranks: a part cut out of the whole, and the whole put together from all parts.

A state is a mapping from names of parameters to tensors of their shapes: weights, gradients, moments of an optimizer. For every
state s of the whole model, and all ranks r of any degree,

    whole([part(s, r) for r]) = s        part(whole(l), r) = l[r], where padding is zero

so a run can go on with another degree, or export the model, through the whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from thinwire.config.model import ModelConfig
from thinwire.parallel.tensor_parts import Part, parts_of

State = Mapping[str, Tensor]
Block = tuple[range, ...]
"""Along each dim."""


@torch.no_grad()
def copy_common(target: Tensor, mine: Part, source: Tensor, its: Part) -> list[Block]:
    """Into `target`, the local tensor of `mine`, what the part `its` of the same parameter has of it, from its local tensor
    `source`. Returns which places of the whole parameter these are."""
    copied = []
    lengths = enumerate(mine.whole_shape(target.shape))
    for cuts in product(*(list(_common(mine.along(dim, length), its.along(dim, length))) for dim, length in lengths)):
        to, come_from = target, source
        for dim, (both, begin, its_begin) in enumerate(cuts):
            to, come_from = to.narrow(dim, begin, len(both)), come_from.narrow(dim, its_begin, len(both))
        to.copy_(come_from)
        copied.append(tuple(both for both, _, _ in cuts))
    return copied


def _common(mine: Sequence[range], its: Sequence[range]) -> Iterator[tuple[range, int, int]]:
    """What both have, and where it begins in either."""
    begin = 0
    for one in mine:
        its_begin = 0
        for other in its:
            both = range(max(one.start, other.start), min(one.stop, other.stop))
            if both:
                yield both, begin + both.start - one.start, its_begin + both.start - other.start
            its_begin += len(other)
        begin += len(one)


def cut_out(value: Tensor, part: Part) -> Tensor:
    """The local tensor, a new one, contiguous."""
    local = value.new_zeros(part.local_shape(value.shape))
    copy_common(local, part, value, part.everything)
    return local


@torch.no_grad()
def part(state: State, config: ModelConfig, degree: int, rank: int) -> dict[str, Tensor]:
    """What rank `rank` of `degree` holds of a whole state, or of some of its names. What is whole on each rank is not copied."""
    parts = parts_of(config, degree, rank)
    return {name: cut_out(value, parts[name]) if name in parts else value for name, value in state.items()}


@torch.no_grad()
def whole(states: Sequence[State], config: ModelConfig) -> dict[str, Tensor]:
    """The whole from the states of all ranks, in their order. What is whole on each rank is taken from the first."""
    parts = [parts_of(config, len(states), rank) for rank in range(len(states))]
    return {
        name: put_together([state[name] for state in states], [one[name] for one in parts]) if name in parts[0] else value
        for name, value in states[0].items()
    }


def put_together(values: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """One parameter, from all ranks' local tensors."""
    result = values[0].new_empty(parts[0].whole_shape(values[0].shape))
    for value, part in zip(values, parts, strict=True):
        copy_common(result, part.everything, value, part)
    return result
