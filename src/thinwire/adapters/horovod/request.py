"""What a rank asks for, as the others must see it, and whether all of them ask for the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

RAGGED = frozenset({"allgather", "alltoall"})
"""Kinds whose tensors may differ in their first dim."""
ITEM_BYTES = {"float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "float16": 2, "bfloat16": 2, "int16": 2}


class HorovodInternalError(RuntimeError):
    """A collective that has failed, on this rank or on another one. One line that names the tensor and the ranks."""


Key = tuple[str, int, str]
"""Kind, process set and name: at most one such request of a rank is outstanding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One call of a rank. tensors: dtype and shape of each. names: of each of several, where they have names of their own.
    members: the process set. splits: rows for each rank (alltoall), or the ranks of a new set. coding, owner: codes, as JSON, and
    whose residuals they keep. last: the owner's step ends with it."""

    kind: str
    name: str
    members: int = 0
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    names: tuple[str, ...] = ()
    op: str = ""
    prescale: float = 1.0
    postscale: float = 1.0
    root: int = -1
    splits: tuple[int, ...] = ()
    coding: str = ""
    owner: str = ""
    last: bool = False

    @property
    def key(self) -> Key:
        return self.kind, self.members, self.name

    @property
    def like(self) -> tuple[Any, ...]:
        """Requests in which this is the same may travel together."""
        return (self.kind, self.members, self.op, self.prescale, self.postscale, self.root, self.coding, self.owner, self.last)

    @property
    def message_bytes(self) -> int:
        """Of its tensors on this rank, about."""
        return sum(ITEM_BYTES.get(dtype, 4) * prod(shape) for dtype, shape in self.tensors)

    def parts(self) -> Iterator[tuple[str, Any]]:
        """What must be the same on all ranks, and what it is called."""
        yield "number of tensors", len(self.tensors)
        yield "list of names", list(self.names)
        for name, (dtype, shape) in zip(self.names, self.tensors, strict=False):
            yield f"dtype of {name}", dtype
            yield f"shape of {name}", list(shape)
        yield "dtype", [dtype for dtype, _ in self.tensors]
        cut = 1 if self.kind in RAGGED else 0
        yield "number of dims", [len(shape) for _, shape in self.tensors]
        yield "shape behind the first dim" if cut else "shape", [list(shape[cut:]) for _, shape in self.tensors]
        yield "op", self.op
        yield "prescale_factor", self.prescale
        yield "postscale_factor", self.postscale
        yield "root rank", self.root
        yield "compression", self.coding
        if self.kind == "add_process_set":
            yield "list of ranks", list(self.splits)


def ranks_in_words(ranks: Sequence[int]) -> str:
    """'rank 3', or 'ranks 0 and 2'."""
    words = [str(rank) for rank in ranks]
    return f"rank {words[0]}" if len(words) == 1 else f"ranks {', '.join(words[:-1])} and {words[-1]}"


def difference(requests: Mapping[int, Request]) -> str:
    """One line: in what requests of one key differ, and between whom; "" if they agree. By rank."""
    first = next(iter(requests.values()))
    for number, (label, value) in enumerate(first.parts()):
        by_value: dict[str, list[int]] = {}
        for rank, request in sorted(requests.items()):
            found = list(request.parts())[number][1]
            by_value.setdefault(_in_words(found), []).append(rank)
        if len(by_value) > 1:
            said = ", ".join(f"{found} on {ranks_in_words(ranks)}" for found, ranks in by_value.items())
            return f"{first.kind} of {first.name!r}: the {label} differs: {said}; call it alike on all ranks"
        del value
    return ""


def _in_words(value: Any) -> str:
    return _in_words(value[0]) if isinstance(value, list) and len(value) == 1 else str(value) or "none"
