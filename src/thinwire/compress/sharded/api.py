"""One line for users of FSDP2: `thinwire.compress_sharded(model, gradients="int4", weights="int8")` after `fully_shard`.

The training loop, the optimizer, the weights in the shards, gradient clipping and accumulation stay as they are. Per unit,
gradients are reduce-scattered in codes with error feedback, and weights are all-gathered in codes; ZeRO++ (Wang et al. 2023,
arXiv 2306.10209) does both. Its third part, a second copy of the weights inside each host (hpZ), is fully_shard's own
`reshard_after_forward=k`, with k ranks a host: the backward pass then gathers weights inside the host, as they are.

On a mesh of two axes, replicas and shards (HSDP), weights and gradients travel as they are among the ranks that share one copy of
the model, which are meant to be those of a host, unless codecs are named; and the mean over the replicas goes through codes
(`replicas`).

Vectors and what `exclude` names stay as they are: their part of the unit's buffer goes beside the codes in the same message. On
one rank nothing is coded. An option or a state that would have no effect is refused. Parameters may be float32, bfloat16,
float16, float64 and complex, of one dtype in each unit, as FSDP2 wants it.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives.clock import has_streams
from thinwire.collectives.executor import Executor
from thinwire.collectives.groups import private_copy, release
from thinwire.collectives.ledger import Ledger, axis_of
from thinwire.compress.base import Codec, make_codec
from thinwire.compress.exchange import make_exchange
from thinwire.compress.sharded.backward import BackwardPass
from thinwire.compress.sharded.layout import Coding, UnitShape, secondary, sharded_transfers
from thinwire.compress.sharded.replicas import Replicas
from thinwire.compress.sharded.residual import Residual, by_rank, mean_residuals
from thinwire.compress.sharded.units import Unit, find_units, prefetch
from thinwire.compress.sharded.wire import CodedAllGather, CodedReduceScatter, Lane, Passes
from thinwire.compress.stages import launched
from thinwire.config.compress import EMBEDDINGS, Coded, NoCompression, ShardedOptions, read_coding
from thinwire.errors import UserError
from thinwire.tomlfile import validate
from thinwire.traffic import Transfer

PLAIN = "float32"
"""Not coded, but through our collectives: one message of its own size, where gloo's reduce-scatter sends two, and overlapped."""
WEIGHT_KINDS = (PLAIN, "bf16", "fp16", "int8", "int4")
GRADIENT_KINDS = (PLAIN, "bf16", "fp16", "int8", "int4", "fp4", "sign")
"""The codecs whose blocks fill CODED_BLOCK."""
AUTO = "auto"
REPLICAS = "int4"
NO_FEEDBACK = "none"
FEEDBACK = "int8"
PREFETCH = 2
"""Units whose weights are under way while one computes: with two, the wire works while a unit's weights are decoded."""


def compress_sharded(
    model: nn.Module,
    gradients: str | None = AUTO,
    weights: str | None = AUTO,
    *,
    replicas: str | Mapping[str, Any] | None = None,
    ledger: Ledger | None = None,
    **options: Any,
) -> "ShardedCompression":
    """Code what the units of `model` exchange from now on. Call after `fully_shard`, on all ranks of the default group.

    gradients, weights: names of codecs, "float32" for none, None to leave FSDP2's own collective in its place. "auto": int4 and
    int8; on a mesh of two axes none.
    replicas: on a mesh of two axes, how the mean over the replicas travels: a kind of `compress_gradients`, or a table of its
    options with the kind; None: int4.
    ledger: where labels go, if the process group is the metered one.

    options:
    feedback: "int8", the default, or "float32", how what coding of gradients loses is kept until the next step; "none": it is
    lost.
    exclude: parameters that stay as they are, one pattern of names or several, with * for anything; vectors always do. Without:
    *embed* and *positions*.
    prefetch_units: weights are asked for so many units ahead in the forward pass, without: 2; 0, or a unit for which
    set_modules_to_forward_prefetch was called: as it is.
    nonfinite: "average", the default: a gradient that is not finite on some rank arrives so at the rank that holds its shard, and
    what the backward pass has changed of the residuals is taken back on all: a GradScaler leaves the step out. "raise": every
    rank raises a UserError that names parameter, ranks and step; of parameters on a device in the next backward pass, or before a
    state is saved.

    UserError for a model without `fully_shard`, an unknown name, an option that would have no effect, and uses of `fully_shard`
    that are not supported.
    """
    chosen = validate(ShardedOptions, options, "compress_sharded")
    units = find_units(model)
    hybrid = units[0].replica_group is not None
    gradients = (PLAIN if hybrid else "int4") if gradients == AUTO else gradients
    weights = (PLAIN if hybrid else "int8") if weights == AUTO else weights
    if hybrid and gradients is None:
        raise UserError(f"compress_sharded: gradients=None, and the mean over the replicas begins with them; say {PLAIN!r}")
    if gradients is None and weights is None:
        raise UserError("compress_sharded has nothing to do: gradients and weights are both None; name a codec for one of them")
    plain = (None, PLAIN)
    for option, value, unused in (
        ("feedback", chosen.feedback, gradients in plain),
        ("exclude", chosen.exclude, gradients in plain and weights in plain and not hybrid),
        ("prefetch_units", chosen.prefetch_units, weights is None),
    ):
        if value is not None and unused:
            raise UserError(
                f"compress_sharded: {option}={value!r} has no effect with gradients={gradients!r} and weights={weights!r}; "
                "leave it out"
            )
    if replicas is not None and not hybrid:
        raise UserError(f"compress_sharded: replicas={replicas!r} has no effect on a mesh of one axis; leave it out")
    coding = coding_of(gradients, weights, chosen.exclude)
    across = _across(replicas or REPLICAS, chosen.exclude) if hybrid else None
    return ShardedCompression(units, coding, chosen, across, ledger or Ledger())


class ShardedCompression:
    """What `compress_sharded` has put in place: its predictions, its residuals, and how to remove it."""

    def __init__(
        self,
        units: list[Unit],
        coding: Coding,
        options: ShardedOptions,
        across: Coded | NoCompression | None,
        ledger: Ledger,
    ) -> None:
        """across: how the mean over the replicas travels, if there are any.

        Makes a group for each kind of message, and a thread where parameters are on the CPU. Collective over all ranks of the
        default group.
        """
        self._units, self._coding, self._ledger = units, coding, ledger
        self._group, self._storage = units[0].process_group, options.feedback or FEEDBACK
        replicas = units[0].replica_group
        if any((unit.process_group, unit.replica_group) != (self._group, replicas) for unit in units):
            raise UserError("the units of the model are sharded over different groups; compress_sharded wants one mesh for all")
        self._rank, self._world_size = self._group.rank(), self._group.size()
        self._residuals: dict[str, Residual] = {}
        self._lanes: list[Lane] = []
        self._restore: list[Any] = []
        self._replicas = None
        if replicas is not None and across is not None:
            exchange = make_exchange(across, ledger, "average")
            self._replicas = Replicas(units, self._world_size, exchange, replicas, self._axis_of(replicas))
        self._device = units[0].device
        self._backward = backward = BackwardPass(self._residuals, self._replicas, options.nonfinite, self._device)
        weights = None if coding.stock_weights else self._lane("weights", self._group, self._axis)
        gradients = None if coding.stock_gradients else self._lane("gradients", self._group, self._axis)
        second: dict[str, Lane] = {}
        for unit in units:
            gather = reduce = None
            if weights is not None:
                gather = CodedAllGather(
                    unit, coding.weights_row(unit.shape, self._world_size), weights, self._second(unit, weights, second)
                )
            if gradients is not None:
                row = coding.gradients_row(unit.shape, self._world_size)
                if self._storage != NO_FEEDBACK and row.codec is not None:
                    self._residuals[unit.name] = Residual(row, self._rank, self._storage, self._device)
                reduce = CodedReduceScatter(unit, row, gradients, self._residuals.get(unit.name), backward, self._replicas)
            self._restore.append(unit.install(gather, reduce))
        if replicas is not None:
            self._restore += [unit.leave_replicas() for unit in units]
        if not coding.stock_weights:
            self._restore.append(prefetch(units, PREFETCH if options.prefetch_units is None else options.prefetch_units))

    def detach(self) -> None:
        """Puts FSDP2's own collectives back, after what is under way. Residuals stay in `state_dict`. Collective."""
        for executor in {lane.executor for lane in self._lanes if lane.executor is not None}:
            executor.close()
        if has_streams(self._device):
            torch.accelerator.synchronize(self._device)
        if self._replicas is not None:
            self._replicas.exchange.detach()
        for lane in self._lanes:
            release(lane.group, self._ledger)
        for restore in self._restore:
            restore()
        self._lanes, self._restore = [], []

    def observe(self, passes: Passes) -> None:
        """Tell `passes` when one waits, and ask it for labels of weights. Before the first pass."""
        for lane in self._lanes:
            lane.passes = passes
        self._backward.waiting = passes.wait

    def when_reduced(self, call: Callable[[UnitShape, Tensor], None]) -> None:
        """From now on `call` gets each unit's gradients, flat, this rank's chunk, as soon as they are reduced in a backward pass:
        on the CPU on a thread, in the same order on all ranks. Not where FSDP2 changes them afterwards, as in float64."""
        self._backward.reduced = call

    @property
    def units(self) -> list[UnitShape]:
        """All units with their parameters; for `sharded_transfers`."""
        return [unit.shape for unit in self._units]

    def transfers(self, micro_batches: int = 1) -> list[Transfer]:
        """Exactly what a step of `micro_batches` sends, gradients being reduced in the last one. Evaluation is not in it."""
        if self._world_size == 1:
            return []
        across = self._replicas.transfers if self._replicas is not None else lambda unit: []
        return sharded_transfers(self.units, self._world_size, self._coding, self._axis, micro_batches, across)

    @property
    def degree(self) -> int:
        """How many ranks share one copy of the model."""
        return self._world_size

    @property
    def memory_bytes(self) -> int:
        """What this rank keeps between steps for its residuals."""
        across = 0 if self._replicas is None else self._replicas.memory_bytes(self.units)
        return across + sum(residual.num_bytes for residual in self._residuals.values())

    def residuals(self) -> dict[str, Tensor]:
        """What coding over the replicas has left out on this rank so far of its shards, by parameter name, flat."""
        return {} if self._replicas is None else self._replicas.residuals()

    def state_dict(self) -> dict[str, Any]:
        """Of this rank: its residuals, in the form in which they are stored. After `backward()`. UserError if parameters are on a
        device, a gradient in that pass was not finite, and an error was asked for."""
        self._backward.check()
        own = {
            "storage": self._storage,
            "world_size": self._world_size,
            "rank": self._rank,
            "units": {name: residual.state_dict() for name, residual in self._residuals.items()},
        }
        return own if self._replicas is None else own | {"replicas": self._replicas.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of the same rank of as many. Before the first step; the run then goes on bit for bit."""
        if (state["world_size"], state["rank"]) != (self._world_size, self._rank):
            raise UserError(
                f"the checkpoint is of rank {state['rank']} of {state['world_size']}, this is rank {self._rank} of "
                f"{self._world_size}; hand the states of all ranks to adopt()"
            )
        if ("replicas" in state) != (self._replicas is not None):
            raise UserError(
                f"the checkpoint is of a mesh of {1 + ('replicas' in state)} axes, this run's has "
                f"{1 + (self._replicas is not None)}; resume on the mesh that it was made with"
            )
        if self._replicas is not None:
            self._replicas.load_state_dict(state["replicas"])
        if state["storage"] != self._storage or set(state["units"]) != set(self._residuals):
            raise UserError(
                f"the checkpoint keeps feedback={state['storage']!r} for {len(state['units'])} units, this run "
                f"{self._storage!r} for {len(self._residuals)}; resume with the same options and units, or use adopt()"
            )
        for name, residual in self._residuals.items():
            residual.load_state_dict(name, state["units"][name])

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """The states of all ranks of an earlier run, however many, of several replicas too: what the average still lacks stays
        the same.

        Units and storage may differ; parameters may not, nor on a mesh of two axes the number of shards. UserError for a
        parameter that is not coded any more.
        """
        same = self._replicas.adopt(states, self._rank, self._world_size) if self._replicas is not None else by_rank(states)
        residuals = mean_residuals(same)
        for residual in self._residuals.values():
            residual.adopt(residuals)
        left = [name for name, vector in residuals.items() if bool(vector.any())]
        if left:
            raise UserError(
                f"the checkpoint holds residuals of {len(left)} parameters that this run does not code, first {left[0]}; keep "
                "the options, or start without the state"
            )

    def _lane(self, kind: str, group: dist.ProcessGroup, axis: str, executor: Executor | None = None) -> Lane:
        own = private_copy(group, f"sharded {kind}")
        self._ledger.axes[own.group_name] = axis
        if executor is None and not launched(self._device):
            executor = Executor(f"thinwire-{kind}")
        self._lanes.append(Lane(own, self._ledger, executor))
        return self._lanes[-1]

    def _second(self, unit: Unit, weights: Lane, made: dict[str, Lane]) -> Lane | None:
        """Where the unit's weights are gathered again from fewer ranks: on the thread of weights, whose order is one."""
        group = unit.secondary_group
        if group is None:
            return None
        if group.group_name not in made:
            made[group.group_name] = self._lane("weights again", group, secondary(self._axis), weights.executor)
        return made[group.group_name]

    def _axis_of(self, group: dist.ProcessGroup) -> str:
        return self._ledger.axes.get(group.group_name, axis_of(group.group_desc))

    @property
    def _axis(self) -> str:
        return self._axis_of(self._group)


def _across(replicas: str | Mapping[str, Any], exclude: tuple[str, ...] | None) -> Coded | NoCompression:
    coding = read_coding(replicas, "compress_sharded: replicas")
    if isinstance(coding, Coded) and coding.exclude is None:
        return coding.model_copy(update={"exclude": exclude})
    return coding


def coding_of(gradients: str | None, weights: str | None, exclude: tuple[str, ...] | None = None) -> Coding:
    """Of the arguments of `compress_sharded`. UserError for an unknown name."""
    return Coding(
        gradients=_codec(gradients, "gradients", GRADIENT_KINDS),
        weights=_codec(weights, "weights", WEIGHT_KINDS),
        stock_gradients=gradients is None,
        stock_weights=weights is None,
        exclude=EMBEDDINGS if exclude is None else exclude,
    )


def _codec(kind: str | None, what: str, kinds: Sequence[str]) -> Codec | None:
    if kind is None or kind == PLAIN:
        return None
    if kind not in kinds:
        raise UserError(f"{what}={kind!r} does not exist; there are {', '.join(kinds)}, and None for FSDP2's own")
    return make_codec(SimpleNamespace(kind=kind))
