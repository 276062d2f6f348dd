"""Key ranges: the flat vector of all parameters, cut over servers.

    range i of k = [ floor(i n / k), floor((i+1) n / k) )        n: number of values

Contiguous, each value in exactly one, sizes differing by one value at most; a parameter may be cut (Li et al., Scaling
distributed machine learning with the parameter server, OSDI 2014, section 4.2). Every value has the same number of bytes, so the
ranges are balanced by bytes; a server's optimizer works value by value, so where the cuts lie changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from thinwire.errors import UserError


@dataclass(frozen=True, slots=True)
class Range:
    """Values [first, end) of the flat vector."""

    first: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Span:
    """Values [first, end) that belong to one parameter, or to several alike; decays: weight decay acts on them."""

    first: int
    end: int
    decays: bool


def cut(numel: int, num_servers: int) -> list[Range]:
    """The ranges in the order of servers. UserError if there are more servers than values."""
    if num_servers > numel:
        raise UserError(f"{num_servers} servers for {numel} parameters leave servers without any; start fewer servers")
    edges = [index * numel // num_servers for index in range(num_servers + 1)]
    return [Range(first, end) for first, end in pairwise(edges)]


def within(spans: Sequence[Span], part: Range) -> list[Span]:
    """The pieces of `spans` that lie in `part`, counted from its beginning."""
    found = []
    for span in spans:
        first, end = max(span.first, part.first), min(span.end, part.end)
        if first < end:
            found.append(Span(first - part.first, end - part.first, span.decays))
    return found
