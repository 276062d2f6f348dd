"""The states of a model shared out to the ranks of a group, which see other tokens each: ZeRO (Rajbhandari et al. 2020) by FSDP2.

Of a parameter of d rows (its dim 0) rank r of s holds c = ceil(d / s) rows, from r c on; behind the last row none. Units are the
blocks, and the rest of the model, the root. In a step of k micro-batches

    forward     a unit is gathered before it computes, the next two units meanwhile
    backward    "always": gathered again, one unit ahead; the root is not
                in the last micro-batch a unit's gradients are reduced and scattered behind it, and waited for at the end
    "never"     a unit is gathered once, in the first micro-batch, and stays until the last backward pass is through with it

Before the last micro-batch each rank adds up whole gradients. The mean over the group is what a shard gets.

What is trained is the shards: `LocalShards` is an ordinary module of plain tensors, in the memory of FSDP2's, under the names of
the whole model; whoever has them needs to know nothing of FSDP2.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from thinwire.collectives.ledger import Ledger
from thinwire.compress.sharded.api import PLAIN, ShardedCompression, compress_sharded
from thinwire.compress.sharded.units import forget_gradients, free_gathered
from thinwire.config.sharded import ShardedSection
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
            *path, last = name.split(".")
            place: nn.Module = self
            for one in path:
                if one not in place._modules:
                    place.add_module(one, nn.Module())
                place = place.get_submodule(one)
            self.locals.append(nn.Parameter(value))
            place.register_parameter(last, self.locals[-1])

    def workload(self, whole: Workload) -> Workload:
        """Of these parameters, and of all that `whole` computes."""
        local = (replace(one, shape=self.parts[one.name].local_shape(one.shape)) for one in whole.parameters)
        return replace(whole, parameters=tuple(local))


def give_gradient(local: nn.Parameter, gradient: Tensor) -> None:
    """Into the one that it has, which may be a view of a bucket."""
    if local.grad is None:
        local.grad = gradient
    else:
        local.grad.copy_(gradient)


class LocalShards(Rows):
    """With their gradients; forward is the whole model's."""

    def __init__(self, model: nn.Module, parts: Parts, compression: ShardedCompression, *, reshards: bool) -> None:
        """model: under `fully_shard`; compression: of it. reshards: "always", as above."""
        whole: dict[str, Any] = dict(model.named_parameters())
        super().__init__({name: shard.detach().to_local() for name, shard in whole.items()}, parts)
        self._hidden: tuple[Any, ShardedCompression] = model, compression  # no submodule, whose parameters would be these too
        self.reshards = reshards
        self._pairs = list(zip(self.locals, whole.values(), strict=True))

    @property
    def model(self) -> Any:
        """The whole one, under `fully_shard`."""
        return self._hidden[0]

    @property
    def compression(self) -> ShardedCompression:
        return self._hidden[1]

    def forward(self, *arguments: Any) -> Any:
        """Collective over the group."""
        return self.model(*arguments)

    @contextmanager
    def passes(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; after the last of a step the shards have gradients. Collective."""
        self.model.set_requires_gradient_sync(last)
        if not self.reshards:
            self.model.set_reshard_after_backward(last)
        yield
        for local, sharded in self._pairs if last else ():
            gradient, sharded.grad = sharded.grad.to_local(), None  # FSDP2 would add the next one to it
            give_gradient(local, gradient)

    def rest(self) -> None:
        """Give up all that is gathered, and gradients that were not reduced: as between two steps. Local."""
        forget_gradients(self.model)
        free_gathered(self.model)


def apply(model: nn.Module, group: dist.ProcessGroup, ledger: Ledger, options: ShardedSection) -> LocalShards:
    """Share out `model`, which has `blocks`, and is whole and the same on all ranks of `group`, on its device. Collective over
    all ranks of the default group. Its end is `LocalShards.compression.detach`."""
    parts = parts_of(model, group)
    always = options.reshard == "always"
    mesh = DeviceMesh.from_group(group, next(model.parameters()).device.type, mesh_dim_names=("shard",))
    blocks: Any = model.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=always)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if always else False)
    gradients, weights = (PLAIN if kind == "none" else kind for kind in (options.gradients, options.weights))
    compression = compress_sharded(model, gradients, weights, ledger=ledger)
    return LocalShards(model, parts, compression, reshards=always)


def parts_of(model: nn.Module, group: dist.ProcessGroup) -> dict[str, Part]:
    """Of each parameter the rows of this rank."""
    degree, rank = group.size(), group.rank()
    return {name: rows_of(parameter.shape[0], degree, rank) for name, parameter in model.named_parameters()}


def rows_of(rows: int, degree: int, rank: int) -> Part:
    """As FSDP2 cuts."""
    each = -(-rows // degree)
    return Part(0, (range(min(rows, rank * each), min(rows, (rank + 1) * each)),), rows)


def traffic(shards: LocalShards, num_micro: int) -> list[Transfer]:
    """What this rank sends over the group in a step, exactly, but for the norm of the gradient."""
    return shards.compression.transfers(num_micro if shards.reshards else 1)


def evaluation_traffic(shards: LocalShards, batches: int) -> list[Transfer]:
    """Of so many forward passes without gradients, behind which `LocalShards.rest` is called."""
    gathers = [one for one in shards.compression.transfers() if one.op == "all_gather"]
    units = shards.compression.units
    return merged(
        replace(one, label=EVALUATION, calls=batches if unit.reshards else 1) for unit, one in zip(units, gathers, strict=True)
    )
