"""The residual of a unit's gradients on one rank: error feedback for a coded reduce-scatter.

Rank i hands w_i[s] = g_i[s] + e_i[s] to the owner of each chunk s but its own, coded by C, and keeps the error:

    result[s] = f (w_s[s] + sum over i != s of D C(w_i[s]))          e_i[s] <- w_i[s] - D C(w_i[s])

so that nothing is lost to the average for good (f = 1/p):   result + 1/p sum_i e_i = 1/p sum_i w_i.   There is no residual of the
own chunk. Stored as int8 blocks (Int8 in blockwise) a further error of at most half a step a value is made in each step, and one
byte a value is enough; "float32" keeps it exact, of gradients in float64 in float64. The new residual takes the place of the old
one at the end of the backward pass (`commit`), unless something in it was not finite (`rollback`).

Another number of ranks: the chunks move, but the mean residual of each parameter, E = 1/p0 sum_i e_i of p0 old ranks, is a vector
of the parameter's shape. Of p new ranks all but the owner take  p / (p - 1) E[s].

Seide et al. 2014, Karimireddy et al. 2019 (error feedback); Wang et al. 2023 (ZeRO++) for the reduce-scatter.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from thinwire.compress.base import padded
from thinwire.compress.memory import BLOCKS
from thinwire.compress.sharded.layout import CODED_BLOCK, Row, shard_length
from thinwire.errors import UserError
from thinwire.workload import ITEM_BYTES


class Residual:
    """Of one unit on one rank. `row` says what is coded; storage is "int8" or "float32"; device: where it is kept."""

    def __init__(self, row: Row, rank: int, storage: str, device: torch.device) -> None:
        self._row, self._storage, self._device = row, storage, device
        self._stored: Tensor | None = None
        self._new: Tensor | None = None
        self._others = [shard for shard in range(row.world_size) if shard != rank]

    @property
    def num_bytes(self) -> int:
        """From the second step on."""
        values = len(self._others) * self._row.coded_values
        item_bytes = max(4, *(ITEM_BYTES[parameter.dtype] for parameter in self._row.coded))
        return BLOCKS.payload_bytes((values,)) if self._storage == "int8" else item_bytes * values

    def add_to(self, values: Tensor) -> None:
        """values [p, coded_values]: the gradients, to which the residual is added."""
        if self._stored is not None:
            for shard, residual in zip(self._others, _rows(self._stored, self._storage), strict=True):
                values[shard] += residual

    def keep(self, error: Tensor) -> None:
        """error [p, coded_values]; the own chunk does not count. Makes a new tensor: states handed out do not change."""
        rows = [error[shard] for shard in self._others]
        self._new = torch.stack([BLOCKS.encode(row.float()) for row in rows] if self._storage == "int8" else rows)

    def commit(self, unless: Tensor | None = None) -> None:
        """What `keep` was given last is the residual; unless: a flag, [] bool: where it is true, it stays what it was."""
        new = self._new
        if new is None:
            return
        if unless is not None:
            new = new.masked_fill_(unless, 0) if self._stored is None else torch.where(unless, self._stored, new)
        self._stored, self._new = new, None

    def rollback(self) -> None:
        """The residual stays what it was at the last `commit`."""
        self._new = None

    def state_dict(self) -> dict[str, Any]:
        """What is stored, as it is."""
        return {"parameters": [(parameter.name, parameter.shape) for parameter in self._row.coded], "owed": self._stored}

    def load_state_dict(self, unit: str, state: Mapping[str, Any]) -> None:
        """UserError where the unit held other parameters."""
        mine, theirs = self.state_dict()["parameters"], state["parameters"]
        if mine != theirs:
            raise UserError(
                f"unit {unit or 'root'} codes {len(mine)} parameters, the checkpoint's {len(theirs)} others; resume with the "
                "same units and exclude, or use adopt()"
            )
        self._stored = None if state["owed"] is None else state["owed"].to(self._device)

    def adopt(self, residuals: dict[str, Tensor]) -> None:
        """Takes out of `residuals` (the mean ones, flat, by parameter name) what belongs to this unit."""
        p = self._row.world_size
        parts = []
        for parameter in self._row.coded:
            length = shard_length(parameter.shape, p)
            vector = residuals.pop(parameter.name, torch.zeros(parameter.numel)).to(self._device)
            if vector.numel() != parameter.numel:
                raise UserError(
                    f"{parameter.name} has {parameter.numel} values, in the checkpoint {vector.numel()}; keep its shape"
                )
            shards = pad(vector, (0, p * length - parameter.numel)).view(p, length)
            parts.append(pad(shards, (0, -length % CODED_BLOCK)))
        self.keep(torch.cat(parts, dim=1) * (p / (p - 1)))
        self.commit()


def mean_residuals(states: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """By parameter name, flat: 1/p0 sum_i e_i of the states of all p0 ranks that made them."""
    p = len(states)
    if {int(state["rank"]) for state in states} != set(range(p)) or any(state["world_size"] != p for state in states):
        raise UserError(f"adopt() wants the states of all {states[0]['world_size']} ranks that made them, and has {p}")
    found: dict[str, Tensor] = {}
    for state in states:
        for unit in state["units"].values():
            if unit["owed"] is None:
                continue
            rows = _rows(unit["owed"], state["storage"])
            rows.insert(state["rank"], torch.zeros_like(rows[0]))  # of the own chunk
            start, values = 0, torch.stack(rows)
            for name, shape in unit["parameters"]:
                length = shard_length(shape, p)
                vector = values[:, start : start + length].reshape(-1)[: prod(shape)] / p
                found[name] = found[name] + vector if name in found else vector
                start += padded(length, CODED_BLOCK)
    return found


def by_rank(states: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One state of each rank, the mean of those of all replicas."""
    return [
        mean_over_replicas([one for one in states if one["rank"] == rank]) for rank in sorted({one["rank"] for one in states})
    ]


def mean_over_replicas(states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A state whose residuals are the mean of those of `states`, of one rank's in all replicas, as "float32" stores them."""
    units = {}
    for name, first in states[0]["units"].items():
        stored = [state["units"][name]["owed"] for state in states]
        rows = [torch.stack(_rows(one, state["storage"])) for one, state in zip(stored, states, strict=True) if one is not None]
        owed = torch.stack(rows).sum(0) / len(states) if rows else None
        units[name] = {"parameters": first["parameters"], "owed": owed}
    return {**states[0], "storage": "float32", "units": units}


def _rows(stored: Tensor, storage: str) -> list[Tensor]:
    """[coded_values] for each chunk but the own one."""
    if storage == "float32":
        return list(stored)
    numel = stored.shape[1] // BLOCKS.payload_bytes((CODED_BLOCK,)) * CODED_BLOCK
    return [BLOCKS.decode(row, (numel,)) for row in stored]
