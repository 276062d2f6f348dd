"""What a rank owes to the average of a unit's gradients: error feedback for a coded reduce-scatter.

Rank i hands w_i[s] = g_i[s] + e_i[s] to the owner of each chunk s but its own, coded by C, and keeps what was lost:

    result[s] = f (w_s[s] + sum over i != s of D C(w_i[s]))          e_i[s] <- w_i[s] - D C(w_i[s])

so that nothing is lost to the average for good (f = 1/p):   result + 1/p sum_i e_i = 1/p sum_i w_i.   Nothing is owed to the own
chunk. Stored as int8 blocks (Int8 in blockwise) a further error of at most half a step a value is made in each step, and one byte
a value is enough; "float32" keeps it exact.

Another number of ranks: the chunks move, but what is owed to the average of each parameter, E = 1/p0 sum_i e_i of p0 old ranks,
is a vector of the parameter's shape. Of p new ranks all but the owner take  p / (p - 1) E[s].

Seide et al. 2014, Karimireddy et al. 2019 (error feedback); Wang et al. 2023 (ZeRO++) for the reduce-scatter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from thinwire.compress.codecs.blockwise import Int8
from thinwire.compress.sharded.layout import CODED_BLOCK, Row, coded_length, shard_length
from thinwire.errors import UserError
from thinwire.workload import Parameter

STORAGES = ("int8", "float32")


class Owed:
    """Of one unit on one rank. `row` says what is coded; storage is "int8" or "float32"."""

    def __init__(self, row: Row, rank: int, storage: str) -> None:
        self._row, self._rank, self._storage = row, rank, storage
        self._stored: Tensor | None = None

    @property
    def parameters(self) -> list[Parameter]:
        """Those that are coded, in the order of the buffer."""
        return [parameter for parameter, flag in zip(self._row.parameters, self._row.coded, strict=True) if flag]

    @property
    def num_bytes(self) -> int:
        """From the second step on."""
        values = (self._row.world_size - 1) * self._row.coded_values
        return Int8().payload_bytes(values) if self._storage == "int8" else 4 * values

    def add_to(self, values: Tensor) -> None:
        """values [p, coded_values]: the gradients, to which what is owed is added."""
        if self._stored is not None:
            for place, shard in enumerate(self._others()):
                values[shard] += self._load(self._stored[place])

    def keep(self, lost: Tensor) -> None:
        """lost [p, coded_values]; the own chunk does not count. Makes a new tensor: states that were handed out do not change."""
        self._stored = torch.stack([self._store(lost[shard]) for shard in self._others()])

    def state_dict(self) -> dict[str, Any]:
        """What is stored, as it is."""
        return {"parameters": [(parameter.name, parameter.shape) for parameter in self.parameters], "owed": self._stored}

    def load_state_dict(self, unit: str, state: Mapping[str, Any]) -> None:
        """UserError where the unit held other parameters."""
        mine = [(parameter.name, tuple(parameter.shape)) for parameter in self.parameters]
        theirs = [(name, tuple(shape)) for name, shape in state["parameters"]]
        if mine != theirs:
            raise UserError(
                f"unit {unit or 'root'} codes {len(mine)} parameters, the checkpoint's {len(theirs)} others; resume with the "
                "same units and exclude, or use adopt()"
            )
        self._stored = state["owed"]

    def adopt(self, owed: dict[str, Tensor]) -> None:
        """Takes out of `owed` (to the average, flat, by parameter name) what belongs to this unit."""
        p = self._row.world_size
        parts = []
        for parameter in self.parameters:
            length = shard_length(parameter.shape, p)
            vector = owed.pop(parameter.name, torch.zeros(parameter.numel))
            if vector.numel() != parameter.numel:
                raise UserError(
                    f"{parameter.name} has {parameter.numel} values, in the checkpoint {vector.numel()}; keep its shape"
                )
            shards = pad(vector, (0, p * length - parameter.numel)).view(p, length)
            parts.append(pad(shards, (0, coded_length(length) - length)))
        self.keep(torch.cat(parts, dim=1) * (p / (p - 1)))

    def _others(self) -> list[int]:
        return [shard for shard in range(self._row.world_size) if shard != self._rank]

    def _store(self, values: Tensor) -> Tensor:
        return Int8().encode(values) if self._storage == "int8" else values.clone()

    def _load(self, stored: Tensor) -> Tensor:
        return Int8().decode(stored, self._row.coded_values) if self._storage == "int8" else stored


def owed_to_average(states: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """By parameter name, flat: 1/p0 sum_i e_i of the states of all p0 ranks that made them."""
    p = len(states)
    if {int(state["rank"]) for state in states} != set(range(p)) or any(state["world_size"] != p for state in states):
        raise UserError(f"adopt() wants the states of all {states[0]['world_size']} ranks that made them, and has {p}")
    found: dict[str, Tensor] = {}
    for state in states:
        for unit in state["units"].values():
            if unit["owed"] is None:
                continue
            start, values = 0, _decoded(unit["owed"], state["storage"], p, state["rank"])
            for name, shape in unit["parameters"]:
                length, numel = shard_length(shape, p), Parameter(name, tuple(shape)).numel
                vector = values[:, start : start + length].reshape(-1)[:numel] / p
                found[name] = found[name] + vector if name in found else vector
                start += coded_length(length)
    return found


def _decoded(stored: Tensor, storage: str, world_size: int, rank: int) -> Tensor:
    """[p, coded_values], zeros for the own chunk."""
    rows = list(stored)
    if storage == "int8":
        numel = stored.shape[1] // Int8().payload_bytes(CODED_BLOCK) * CODED_BLOCK
        rows = [Int8().decode(row, numel) for row in rows]
    rows.insert(rank, torch.zeros_like(rows[0]))
    assert len(rows) == world_size, f"{len(rows)} chunks of {world_size}"
    return torch.stack(rows)
