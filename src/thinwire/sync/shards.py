"""What one rank holds of a model: all of each parameter, or under FSDP2 a shard of it.

With `fully_shard` inside a replica, its rank s holds shard s of each parameter (a DTensor). The mean over replicas m, the outer
step and the mixing work value by value, and so commute with cutting:

    shard s of F(x_1, .., x_M) = F(shard s of x_1, .., shard s of x_M)

Rank s of a replica therefore exchanges what it holds with rank s of the others, and with nobody else. Codes are of each shard by
itself. A shard may be empty, on all these ranks alike, since the same place has the same shape in each replica.

What is handed out is real: of complex numbers their parts, as `torch.view_as_real` gives them.

Whoever writes shards frees what FSDP2 has gathered of them (`free_gathered`), or the next forward pass would compute with the old
values.
"""

import hashlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from thinwire.compress.sharded.units import free_gathered
from thinwire.errors import UserError
from thinwire.sync.buckets import real_shape
from thinwire.workload import ITEM_BYTES, Parameter, plain_name


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`, in the same memory, without autograd."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class Shards(Mapping[str, Tensor]):
    """What this rank holds of each parameter of `model`, by name; written to, the model changes. No communication.

    Names are without what torch.compile puts in between.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        free_gathered(model)  # only then are the parameters those which the optimizer knows
        self._parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}

    @property
    def device(self) -> torch.device:
        """Of the first; there is one for all."""
        return next((local(one).device for one in self._parameters.values()), torch.device("cpu"))

    def trained(self) -> list[str]:
        """Names of the parameters that are not frozen, as it is now; frozen ones stay what they are on every replica."""
        return [name for name, parameter in self._parameters.items() if parameter.requires_grad]

    def __getitem__(self, name: str) -> Tensor:
        held = local(self._parameters[name])
        return torch.view_as_real(held) if held.is_complex() else held

    def described(self, name: str) -> Parameter:
        """What this rank holds of it, as flat buffers have it. UserError for a dtype that cannot be exchanged."""
        dtype = str(self[name].dtype).removeprefix("torch.")
        if dtype not in ITEM_BYTES:
            raise UserError(f"{name} is {dtype}; replicas exchange {', '.join(ITEM_BYTES)} and complex numbers of these")
        return Parameter(name, real_shape(local(self._parameters[name])), dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor], keep: float = 0.0) -> None:
        """x <- keep x + (1 - keep) value, for each name in `values`, which have as many values; rounded once."""
        for name, value in values.items():
            held = self[name]
            value = value.reshape(held.shape)
            held.copy_(torch.lerp(held.to(value.dtype), value, 1 - keep) if keep else value)
        free_gathered(self._model)

    def cut(self) -> dict[str, DTensor]:
        """The parameters of which other ranks of this replica hold other parts."""
        return {name: one for name, one in self._parameters.items() if isinstance(one, DTensor)}

    def check_group(self, group: dist.ProcessGroup) -> None:
        """UserError if ranks of `group` hold other shards of the same replica. Local."""
        ranks = dist.get_process_group_ranks(group)
        for name, parameter in self.cut().items():
            inside = set(parameter.device_mesh.mesh.flatten().tolist())
            if len(inside.intersection(ranks)) > 1:
                raise UserError(
                    f"DiLoCo: {name} is sharded over the ranks {sorted(inside)}, of which group = {sorted(ranks)} has several; "
                    'hand over those with the same shard in each replica: group=mesh["outer"]'
                )

    def check_same_everywhere(self, group: dist.ProcessGroup) -> None:
        """UserError on all ranks if those of some group do not hold the same shards. Collective over all ranks."""
        places = {name: parameter.device_mesh.get_coordinate() for name, parameter in self.cut().items()}
        held = [(name, tuple(values.shape), str(values.dtype), places.get(name)) for name, values in self.items()]
        gathered: list[tuple[list[int], str]] = [([], "")] * dist.get_world_size()
        digest = hashlib.sha256(repr(held).encode()).hexdigest()
        dist.all_gather_object(gathered, (dist.get_process_group_ranks(group), digest))
        for ranks, _ in gathered:
            if len({gathered[rank][1] for rank in ranks}) > 1:
                raise UserError(
                    f"DiLoCo: the ranks {ranks} of a group do not hold parameters, or shards, of the same names, shapes, dtypes "
                    "and places; make the same model on all, and groups of the ranks at the same place in their replicas"
                )
