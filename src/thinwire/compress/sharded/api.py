"""One line for users of FSDP2: `thinwire.compress_sharded(model, gradients="int4", weights="int8")` after `fully_shard`.

The training loop, the optimizer, the float32 weights in the shards, gradient clipping and accumulation stay as they are. Per
unit, gradients are reduce-scattered in codes with error feedback, and weights are all-gathered in codes; ZeRO++ (Wang et al.
2023, arXiv 2306.10209) does both. Its third part, a second copy of the weights inside a host, is not here.

Vectors and what `exclude` names stay as they are: their part of the unit's buffer goes beside the codes in the same message. On
one rank nothing is coded. An option or a state that would have no effect is refused.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from thinwire.collectives.executor import Executor
from thinwire.collectives.groups import private_copy, release
from thinwire.collectives.ledger import Ledger, axis_of
from thinwire.compress.base import Codec, make_codec
from thinwire.compress.sharded.layout import Coding, UnitShape, sharded_transfers
from thinwire.compress.sharded.residual import STORAGES, Residual, mean_residuals
from thinwire.compress.sharded.units import Unit, find_units, prefetch
from thinwire.compress.sharded.wire import CodedAllGather, CodedReduceScatter, Lane
from thinwire.config.compress import EXCLUDED
from thinwire.errors import UserError
from thinwire.traffic import Transfer

PLAIN = "float32"
"""Not coded, but through our collectives: one message of its own size, where gloo's reduce-scatter sends two, and overlapped."""
WEIGHT_KINDS = (PLAIN, "bf16", "fp16", "int8", "int4")
GRADIENT_KINDS = (PLAIN, "bf16", "fp16", "int8", "int4", "fp4", "sign")
"""The codecs whose blocks fill CODED_BLOCK."""
NO_FEEDBACK = "none"
FEEDBACK = "int8"
PREFETCH = 2
"""Units whose weights are under way while one computes: with two, the wire works while a unit's weights are decoded."""


def compress_sharded(
    model: nn.Module,
    gradients: str | None = "int4",
    weights: str | None = "int8",
    *,
    feedback: str | None = None,
    exclude: str | Sequence[str] | None = None,
    prefetch_units: int | None = None,
    ledger: Ledger | None = None,
) -> "ShardedCompression":
    """Code what the units of `model` exchange from now on. Call after `fully_shard`, on all ranks of the default group.

    gradients, weights: names of codecs, "float32" for none, None to leave FSDP2's own collective in its place.
    feedback: "int8", which None is, or "float32", how what coding of gradients loses is kept until the next step; "none": it is
    lost.
    exclude: parameters that stay as they are, one pattern of names or several, with * for anything; vectors always do. None:
    *embed* and *positions*.
    prefetch_units: weights are asked for so many units ahead in the forward pass, None: 2; 0, or a unit for which
    set_modules_to_forward_prefetch was called: as it is.
    ledger: where labels go, if the process group is the metered one.

    UserError for a model without `fully_shard`, an unknown name, an option that would have no effect, and uses of `fully_shard`
    that are not supported.
    """
    if gradients is None and weights is None:
        raise UserError("compress_sharded has nothing to do: gradients and weights are both None; name a codec for one of them")
    if feedback not in (*STORAGES, NO_FEEDBACK, None):
        raise UserError(f"feedback {feedback!r} does not exist; there are {', '.join(STORAGES)}, {NO_FEEDBACK}")
    plain = (None, PLAIN)
    for option, value, unused in (
        ("feedback", feedback, gradients in plain),
        ("exclude", exclude, gradients in plain and weights in plain),
        ("prefetch_units", prefetch_units, weights is None),
    ):
        if value is not None and unused:
            raise UserError(
                f"compress_sharded: {option}={value!r} has no effect with gradients={gradients!r} and weights={weights!r}; "
                "leave it out"
            )
    patterns = EXCLUDED if exclude is None else (exclude,) if isinstance(exclude, str) else tuple(exclude)
    coding = Coding(
        gradients=_codec(gradients, "gradients", GRADIENT_KINDS),
        weights=_codec(weights, "weights", WEIGHT_KINDS),
        stock_gradients=gradients is None,
        stock_weights=weights is None,
        exclude=patterns,
    )
    depth = PREFETCH if prefetch_units is None else prefetch_units
    return ShardedCompression(find_units(model), coding, feedback or FEEDBACK, depth, ledger or Ledger())


class ShardedCompression:
    """What `compress_sharded` has put in place: its predictions, its residuals, and how to remove it."""

    def __init__(self, units: list[Unit], coding: Coding, feedback: str, prefetch_units: int, ledger: Ledger) -> None:
        """Makes a group and a thread for each kind of message. Collective over all ranks of the default group."""
        self._units, self._coding, self._ledger = units, coding, ledger
        self._group, self._storage = units[0].process_group, feedback
        if any(unit.process_group != self._group for unit in units):
            raise UserError("the units of the model are sharded over different groups; compress_sharded wants one mesh for all")
        self._rank, self._world_size = self._group.rank(), self._group.size()
        self._residuals: dict[str, Residual] = {}
        self._lanes: list[Lane] = []
        self._restore: list[Any] = []
        weights = None if coding.stock_weights else self._lane("weights")
        gradients = None if coding.stock_gradients else self._lane("gradients")
        for unit in units:
            gather = reduce = None
            if weights is not None:
                gather = CodedAllGather(unit, coding.weights_row(unit.shape, self._world_size), weights)
            if gradients is not None:
                row = coding.gradients_row(unit.shape, self._world_size)
                if feedback != NO_FEEDBACK and row.codec is not None:
                    self._residuals[unit.name] = Residual(row, self._rank, feedback)
                reduce = CodedReduceScatter(unit, row, gradients, self._residuals.get(unit.name))
            self._restore.append(unit.install(gather, reduce))
        if prefetch_units and not coding.stock_weights:
            self._restore.append(prefetch(units, prefetch_units))

    def detach(self) -> None:
        """Puts FSDP2's own collectives back, after what is under way. Residuals stay in `state_dict`."""
        for lane in self._lanes:
            lane.executor.close()
            release(lane.group, self._ledger)
        for restore in self._restore:
            restore()
        self._lanes, self._restore = [], []

    @property
    def units(self) -> list[UnitShape]:
        """All units with their parameters; for `sharded_transfers`."""
        return [unit.shape for unit in self._units]

    def transfers(self, micro_batches: int = 1) -> list[Transfer]:
        """Exactly what a step of `micro_batches` sends, gradients being reduced in the last one. Evaluation is not in it."""
        if self._world_size == 1:
            return []
        return sharded_transfers(self.units, self._world_size, self._coding, self._axis, micro_batches)

    @property
    def memory_bytes(self) -> int:
        """What this rank keeps between steps for its residuals."""
        return sum(residual.num_bytes for residual in self._residuals.values())

    def state_dict(self) -> dict[str, Any]:
        """Of this rank: its residuals, in the form in which they are stored. After `backward()`."""
        return {
            "storage": self._storage,
            "world_size": self._world_size,
            "rank": self._rank,
            "units": {name: residual.state_dict() for name, residual in self._residuals.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of the same rank of as many. Before the first step; the run then goes on bit for bit."""
        if (state["world_size"], state["rank"]) != (self._world_size, self._rank):
            raise UserError(
                f"the checkpoint is of rank {state['rank']} of {state['world_size']}, this is rank {self._rank} of "
                f"{self._world_size}; hand the states of all ranks to adopt()"
            )
        if state["storage"] != self._storage or set(state["units"]) != set(self._residuals):
            raise UserError(
                f"the checkpoint keeps feedback={state['storage']!r} for {len(state['units'])} units, this run "
                f"{self._storage!r} for {len(self._residuals)}; resume with the same options and units, or use adopt()"
            )
        for name, residual in self._residuals.items():
            residual.load_state_dict(name, state["units"][name])

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """The states of all ranks of an earlier run, however many: what the average still lacks stays the same.

        Units and storage may differ; parameters may not. UserError for a parameter that is not coded any more.
        """
        residuals = mean_residuals(states)
        for residual in self._residuals.values():
            residual.adopt(residuals)
        left = [name for name, vector in residuals.items() if bool(vector.any())]
        if left:
            raise UserError(
                f"the checkpoint holds residuals of {len(left)} parameters that this run does not code, first {left[0]}; keep "
                "the options, or start without the state"
            )

    def _lane(self, kind: str) -> Lane:
        group = private_copy(self._group, f"sharded {kind}")
        self._ledger.axes[group.group_name] = self._axis
        self._lanes.append(Lane(group, self._ledger, Executor(f"thinwire-{kind}")))
        return self._lanes[-1]

    @property
    def _axis(self) -> str:
        return self._ledger.axes.get(self._group.group_name, axis_of(self._group.group_desc))


def _codec(kind: str | None, what: str, kinds: Sequence[str]) -> Codec | None:
    if kind is None or kind == PLAIN:
        return None
    if kind not in kinds:
        raise UserError(f"{what}={kind!r} does not exist; there are {', '.join(kinds)}, and None for FSDP2's own")
    return make_codec(SimpleNamespace(kind=kind))
