"""NCCL's tuner file from measurements: which algorithm and protocol for which sizes, one line a range.

    coll,min,max,algo,proto,channels,nNodes,nRanks,numPipeOps,regBuff

as NCCL's example tuner plugin reads it (NCCL_TUNER_PLUGIN, NCCL_TUNER_CONFIG_FILE). It takes the first line that fits; lines
with # are comments; -1 fits any number. Sizes are NCCL's, in bytes.

Of the settings measured for one size the fastest wins; a range goes from the first to the last of neighbouring measured sizes
with the same winner. Nothing is said about sizes between two winners, below the smallest and above the largest.
"""

from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from thinwire.errors import UserError

Collective = Literal["broadcast", "reduce", "allgather", "reducescatter", "allreduce"]
Algorithm = Literal["tree", "ring", "collnet_direct", "collnet_chain", "nvls", "nvls_tree", "pat"]
Protocol = Literal["ll", "ll128", "simple"]

_HEADER = "# coll,min,max,algo,proto,channels,nNodes,nRanks,numPipeOps,regBuff"
FIELDS = ("coll", "min", "max", "algo", "proto", "channels", "nodes", "ranks", "pipe_ops", "registered")


class Measured(BaseModel):
    """One call of `bytes` took `seconds`. pipe_ops, registered: only where it was measured for these alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    coll: Collective
    algo: Algorithm
    proto: Protocol
    channels: int = Field(default=-1, ge=-1)
    nodes: int = Field(ge=1)
    ranks: int = Field(ge=1)
    pipe_ops: int = Field(default=-1, ge=-1)
    registered: int = Field(default=-1, ge=-1, le=1)
    bytes: int = Field(ge=0)
    seconds: float = Field(gt=0)


def ranges(measured: Iterable[Measured]) -> list[dict[str, str | int]]:
    """See the top of the file. Values by `FIELDS`."""
    cases: dict[tuple[str, int, int, int, int], dict[int, Measured]] = defaultdict(dict)
    for one in measured:
        sizes = cases[one.coll, one.nodes, one.ranks, one.pipe_ops, one.registered]
        if one.bytes not in sizes or one.seconds < sizes[one.bytes].seconds:
            sizes[one.bytes] = one
    found = []
    for case in sorted(cases):
        winners = [cases[case][size] for size in sorted(cases[case])]
        for _, group in groupby(winners, lambda one: (one.algo, one.proto, one.channels)):
            same = list(group)
            setting = same[0].model_dump(exclude={"bytes", "seconds"})
            found.append({**setting, "min": same[0].bytes, "max": same[-1].bytes})
    return found


def to_csv(lines: Iterable[dict[str, str | int]]) -> str:
    """The file."""
    rows = [",".join(str(line[field]) for field in FIELDS) for line in lines]
    return "\n".join([_HEADER, *rows]) + "\n"


def read_measured(text: str) -> list[Measured]:
    """From JSON: a list of rows, as `Measured`."""
    try:
        rows = TypeAdapter(list[Measured]).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "rows"
        raise UserError(f"these are not measurements: {where}: {first['msg']}") from None
    if not rows:
        raise UserError(f"there are no measurements; a row has {', '.join(Measured.model_fields)}")
    return rows
