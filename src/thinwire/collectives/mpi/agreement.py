"""Before data moves, the ranks of a group compare what they are about to do: 40 B from each to each other.

MPI takes for granted that all ranks make the same call with the same sizes; where they do not it may wait for ever, or take one
tensor's bytes for another's. So each collective begins with an all-gather of (op, type, values, root, reduction), and every rank
decides alike on the same table: go on, or raise an error that names two ranks and what they called. After that error the group
can still be used. The cost is one exchange of small messages before each collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from thinwire.collectives.mpi.buffers import NAMES
from thinwire.collectives.mpi.engine import Steps
from thinwire.collectives.wire import OPS
from thinwire.errors import UserError

_TYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


@dataclass(frozen=True, slots=True)
class Call:
    """What one rank is about to do. values: -1 where they may differ by rank; root: -1 where there is none."""

    op: str
    dtype: torch.dtype = torch.uint8
    values: int = 0
    root: int = -1
    reduction: str = ""

    def row(self) -> list[int]:
        reduction = NAMES.index(self.reduction) if self.reduction else -1
        return [OPS.index(self.op), _TYPES.index(self.dtype), self.values, self.root, reduction]


def agreed(comm: Any, call: Call, name: str) -> Steps:
    """The steps by which the ranks of `comm` compare their calls. UserError on each rank where they differ."""
    own = np.array(call.row(), dtype=np.int64)
    table = np.empty((comm.Get_size(), own.size), dtype=np.int64)
    yield [comm.Iallgather(own, table)]
    others = np.flatnonzero((table != table[0]).any(axis=1))
    if others.size:
        raise UserError(
            f"the ranks of group {name!r} do not make the same call: its rank 0 calls {_words(table[0])}, "
            f"its rank {others[0]} calls {_words(table[others[0]])}; each must make the same calls in the same order"
        )


def agreed_parts(comm: Any, sent: Sequence[int], received: Sequence[int], name: str) -> Steps:
    """The same for an all-to-all: `sent[i]` bytes go to rank i, `received[i]` are expected from it."""
    own = np.array([*sent, *received], dtype=np.int64)
    p = comm.Get_size()
    table = np.empty((p, own.size), dtype=np.int64)
    yield [comm.Iallgather(own, table)]
    sends, expects = table[:, :p], table[:, p:]
    wrong = np.argwhere(sends != expects.T)
    if wrong.size:
        a, b = wrong[0]
        raise UserError(
            f"all_to_all in group {name!r}: its rank {a} sends {sends[a, b]} B to its rank {b}, which expects {expects[b, a]} B; "
            "the output splits must be what the others send"
        )


def _words(row: Any) -> str:
    op, dtype, values, root, reduction = (int(number) for number in row)
    text = OPS[op]
    if text != "barrier":
        text += f" of {f'{values} ' if values >= 0 else ''}values of {str(_TYPES[dtype]).removeprefix('torch.')}"
    text += f" with {NAMES[reduction]}" if reduction >= 0 else ""
    return text + (f" with root {root}" if root >= 0 else "")
