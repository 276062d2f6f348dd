"""The states of a model shared out to the ranks of a group, which see other tokens each: ZeRO (Rajbhandari et al. 2020) by FSDP2.

Of a parameter of d rows (its dim 0) rank r of s holds c = ceil(d / s) rows, from r c on; behind the last row none. Units are the
blocks (or other modules that are named), and the rest of the model, the root. In a step of k micro-batches

    forward     a unit is gathered before it computes, the next two units meanwhile
    backward    "always": gathered again, one unit ahead; the root is not
                in the last micro-batch a unit's gradients are reduced and scattered behind it, and waited for at the end
    "never"     a unit is gathered once, in the first micro-batch, and stays until the last backward pass is through with it

Before the last micro-batch each rank adds up whole gradients. The mean over the group is what a shard gets.

What is trained is the shards: `LocalShards` is an ordinary module of plain tensors, in the memory of FSDP2's, under the names of
the whole model; whoever has them needs to know nothing of FSDP2.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from thinwire.collectives.ledger import Ledger
from thinwire.compress.sharded.api import PLAIN, ShardedCompression, coding_of, compress_sharded
from thinwire.compress.sharded.layout import UnitShape, shard_length, sharded_transfers
from thinwire.compress.sharded.units import forget_gradients, free_gathered
from thinwire.config.sharded import ShardedSection
from thinwire.parallel.tensor import norm_transfers
from thinwire.parallel.tensor_parts import Part, Parts
from thinwire.traffic import EVALUATION, Transfer, merged
from thinwire.workload import Workload


class Rows(nn.Module):
    """This rank's part of each parameter of a model, under its name there. parts: which rows they are."""

    def __init__(self, values: Mapping[str, Tensor], parts: Parts) -> None:
        """values: in whose memory the parameters are."""
        super().__init__()
        self.parts = parts
        self.locals: list[nn.Parameter] = []
        """In the order of `values`."""
        for name, value in values.items():
            self.locals.append(nn.Parameter(value))
            self._place_of(name).register_parameter(name.rpartition(".")[2], self.locals[-1])

    def _place_of(self, name: str) -> nn.Module:
        """The module that has what is of this name."""
        place: nn.Module = self
        for one in name.split(".")[:-1]:
            if one not in place._modules:
                place.add_module(one, nn.Module())
            place = place.get_submodule(one)
        return place


def give_gradient(local: nn.Parameter, gradient: Tensor) -> None:
    """Into the one that it has, which may be a view of a bucket."""
    if local.grad is None:
        local.grad = gradient
    else:
        local.grad.copy_(gradient)


class LocalShards(Rows):
    """With their gradients, and the buffers that checkpoints keep; forward is the whole model's."""

    def __init__(self, model: nn.Module, parts: Parts, compression: ShardedCompression, *, reshards: bool) -> None:
        """model: under `fully_shard`; compression: of it. reshards: "always", as above."""
        whole: dict[str, Any] = dict(model.named_parameters())
        super().__init__({name: shard.detach().to_local() for name, shard in whole.items()}, parts)
        kept = model.state_dict()
        for name, buffer in model.named_buffers():  # each rank has them whole
            if name in kept:
                self._place_of(name).register_buffer(name.rpartition(".")[2], buffer)
        self._hidden: tuple[Any, ShardedCompression] = model, compression  # no submodule, whose parameters would be these too
        self.reshards = reshards
        self._pairs = list(zip(self.locals, whole.values(), strict=True))
        self.listener: Callable[[str, Mapping[str, Tensor]], None] | None = None
        """Gets the gradients of a unit's shards, by name, when they are reduced; then `passes` gives them no more."""
        self._handed_over: set[int] = set()
        self._by_name = dict(zip(whole, self.locals, strict=True))
        compression.when_reduced(self._hand_over)

    @property
    def model(self) -> Any:
        """The whole one, under `fully_shard`."""
        return self._hidden[0]

    @property
    def compression(self) -> ShardedCompression:
        return self._hidden[1]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Collective over the group."""
        return self.model(*arguments, **named)

    @contextmanager
    def passes(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; after the last of a step the shards have gradients. Collective."""
        self.model.set_requires_gradient_sync(last)
        if not self.reshards:
            self.model.set_reshard_after_backward(last)
        yield
        for local, sharded in self._pairs if last else ():
            gradient, sharded.grad = sharded.grad.to_local(), None  # FSDP2 would add the next one to it
            if id(local) not in self._handed_over:
                give_gradient(local, gradient)
        self._handed_over.clear()

    def _hand_over(self, unit: UnitShape, chunk: Tensor) -> None:
        """On the thread of gradients; the passes end behind it."""
        if self.listener is None:
            return
        named = [(one, self._by_name[one.name]) for one in unit.parameters if one.name not in unit.frozen]
        pieces = chunk.split([shard_length(one.shape, self.compression.degree) for one, _ in named])
        values = {one.name: piece[: local.numel()].view(local.shape) for (one, local), piece in zip(named, pieces, strict=True)}
        self._handed_over.update(id(local) for _, local in named)
        self.listener(unit.name, values)

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        """Inside, the whole model, whose passes send nothing. Collective over the group when it begins."""
        units = [one for one in self.model.modules() if isinstance(one, FSDPModule)]
        for one in units:
            one.set_reshard_after_forward(False, recurse=False)
            one.unshard()
        yield self.model
        for one in units:
            one.set_reshard_after_forward(self.reshards and one is not self.model, recurse=False)
        self.rest()

    def rest(self) -> None:
        """Give up all that is gathered, and gradients that were not reduced: as between two steps. Local."""
        forget_gradients(self.model)
        free_gathered(self.model)


def apply(
    model: nn.Module,
    group: dist.ProcessGroup,
    ledger: Ledger,
    options: ShardedSection,
    units: Sequence[str] | None = None,
    parts: Parts = {},  # noqa: B006 (never changed)
) -> LocalShards:
    """Share out `model`, which is whole and the same on all ranks of `group`, on its device. Collective over all ranks of the
    default group. Its end is `LocalShards.compression.detach`.

    units: names of the modules that are gathered at once; None: the members of its longest nn.ModuleList, if it has one. What is
    in none of them is the root. parts: which tensor ranks have of its parameters, if `tensor.apply` came before.
    """
    rows = parts_of(model, group, parts)
    always = options.reshard == "always"
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other, such as channels last
    mesh = DeviceMesh.from_group(group, next(model.parameters()).device.type, mesh_dim_names=("shard",))
    for name in found_units(model) if units is None else units:
        fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=always)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if always else False)
    compression = compress_sharded(model, *_kinds(options), ledger=ledger)
    return LocalShards(model, rows, compression, reshards=always)


def found_units(model: nn.Module) -> list[str]:
    """Names of the members of its longest nn.ModuleList or, if it is one itself, nn.Sequential, that have parameters."""
    if isinstance(model, nn.Sequential):
        lists: list[tuple[str, nn.Module]] = [("", model)]
    else:
        lists = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList)]
    name, longest = max(lists, key=lambda one: len(list(one[1].children())), default=("", nn.Module()))
    members = ((f"{name}.{number}".lstrip("."), one) for number, one in longest.named_children())
    return [member for member, one in members if next(one.parameters(), None) is not None]


def units_with_root(model: nn.Module) -> list[str]:
    """`found_units`, of which the first is left to the root if nothing else is."""
    units = found_units(model)
    inside = tuple(f"{name}." for name in units)
    return units if any(not name.startswith(inside) for name, _ in model.named_parameters()) else units[1:]


def parts_of(model: nn.Module, group: dist.ProcessGroup, parts: Parts) -> dict[str, Part]:
    """Of each parameter the rows of this rank. parts: as of `apply`."""
    degree, rank = group.size(), group.rank()
    return {name: rows_of(one.shape[0], degree, rank, parts.get(name)) for name, one in model.named_parameters()}


def rows_of(rows: int, degree: int, rank: int, part: Part | None = None) -> Part:
    """As FSDP2 cuts a parameter of so many rows, which is the local one of `part`; None: the whole one."""
    each = -(-rows // degree)
    kept = range(min(rows, rank * each), min(rows, (rank + 1) * each))
    if part is None or part.dim != 0:
        return Part(0, (kept,), rows, across=part)
    begin, ranges = 0, list[range]()
    for one in part.ranges:
        if some := one[max(0, kept.start - begin) : max(0, kept.stop - begin)]:
            ranges.append(some)
        begin += len(one)
    return Part(0, tuple(ranges), part.whole, len(kept) - sum(map(len, ranges)))


def shared_out(whole: Workload, degree: int, rank: int) -> Workload:
    """Of a rank's rows of all parameters, and of all that `whole` computes."""
    local = (replace(one, shape=rows_of(one.shape[0], degree, rank).local_shape(one.shape)) for one in whole.parameters)
    return replace(whole, parameters=tuple(local))


def traffic(whole: Workload, degree: int, options: ShardedSection, num_micro: int, *, clips: bool) -> list[Transfer]:
    """What a rank sends over the group in a step, exactly. clips: with the norm of the gradient."""
    found = _transfers(whole, degree, options, num_micro if options.reshard == "always" else 1)
    return found + (norm_transfers("shard", getattr(torch, whole.parameters[0].dtype)) if clips else [])


def evaluation_traffic(whole: Workload, degree: int, options: ShardedSection, batches: int) -> list[Transfer]:
    """Of so many forward passes without gradients, behind which `LocalShards.rest` is called."""
    gathers = (one for one in _transfers(whole, degree, options) if one.op == "all_gather")
    return merged(replace(one, label=EVALUATION, calls=batches if one.calls > 1 else 1) for one in gathers)


def _transfers(whole: Workload, degree: int, options: ShardedSection, num_micro: int = 1) -> list[Transfer]:
    """As `ShardedCompression.transfers` says of the units of `apply`."""
    blocks = {name: [one for one in whole.parameters if one.name.startswith(f"{name}.")] for name in whole.block_names}
    in_blocks = {one.name for its in blocks.values() for one in its}
    root = UnitShape("", tuple(one for one in whole.parameters if one.name not in in_blocks), reshards=False)
    always = options.reshard == "always"
    units = [root, *(UnitShape(name, tuple(its), reshards=always) for name, its in blocks.items())]
    return sharded_transfers(units, degree, coding_of(*_kinds(options)), "shard", num_micro)


def _kinds(options: ShardedSection) -> tuple[str, str]:
    """Of gradients, of weights."""
    gradients, weights = (PLAIN if kind == "none" else kind for kind in (options.gradients, options.weights))
    return gradients, weights
