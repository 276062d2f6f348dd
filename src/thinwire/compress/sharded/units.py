"""What of FSDP2 (`fully_shard`) is private in PyTorch and needed here: all of it is in this file.

The hooks `set_custom_all_gather` and `set_custom_reduce_scatter` are public, and take any object that can be called as FSDP2's
own are. Which parameters lie in a unit's flat buffer, and whether anybody reads a reduced gradient before the backward pass is
over, only the unit's FSDPParamGroup knows. Written against torch 2.13; what a torch lacks is named in a UserError.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

from thinwire.compress.sharded.layout import UnitShape
from thinwire.errors import UserError
from thinwire.workload import Parameter, plain_name

NEEDED = ("set_custom_all_gather", "set_custom_reduce_scatter", "set_modules_to_forward_prefetch", "_get_fsdp_state")
GROUP_NEEDED = ("fsdp_params", "mesh_info", "post_forward_mesh_info", "_all_gather_comm", "_reduce_scatter_comm")


@dataclass
class Unit:
    """One module to which `fully_shard` was applied and that has parameters of its own. name: its path in the model."""

    name: str
    module: Any
    names: list[str]
    """Of its parameters in the whole model, in the order of the flat buffer."""
    is_root: bool

    @property
    def param_group(self) -> Any:
        """FSDP2's FSDPParamGroup."""
        return self.module._get_fsdp_state()._fsdp_param_group

    @property
    def device(self) -> torch.device:
        """On which it is gathered and reduced."""
        device: torch.device = self.param_group.device
        return device

    @property
    def process_group(self) -> dist.ProcessGroup:
        """Over which it is sharded."""
        return self.param_group.mesh_info.shard_process_group

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same shard, if there are any."""
        return getattr(self.param_group.mesh_info, "replicate_process_group", None)

    @property
    def secondary_group(self) -> dist.ProcessGroup | None:
        """Those that hold a second copy of the weights between the passes, if these are not those over which it is sharded."""
        later = self.param_group.post_forward_mesh_info
        return None if later in (None, self.param_group.mesh_info) else later.shard_process_group

    @property
    def shape(self) -> UnitShape:
        """The parameters in the flat buffer, as they are now."""
        pairs = list(zip(self.names, self.param_group.fsdp_params, strict=True))
        policy, second = self.param_group.mp_policy, self.secondary_group
        return UnitShape(
            self.name,
            parameters=tuple(_described(name, parameter) for name, parameter in pairs),
            reshards=self.reshards,
            frozen=frozenset(name for name, parameter in pairs if not parameter.sharded_param.requires_grad),
            weights_dtype=_name_of(policy.param_dtype),
            gradients_dtype=_name_of(policy.reduce_dtype or policy.param_dtype),
            secondary_ranks=second.size() if second is not None else 0,
            complex=frozenset(name for name, parameter in pairs if parameter.sharded_param.is_complex()),
        )

    @property
    def reshards(self) -> bool:
        """Whether weights are gathered again for the backward pass. FSDP2 does not, for a root that leaves it to FSDP2."""
        automatic = getattr(self.module._get_fsdp_state(), "_auto_reshard_after_forward", False)
        return self.param_group.post_forward_mesh_info is not None and not (self.is_root and automatic)

    def may_wait_for_gradients(self) -> bool:
        """Nobody reads the reduced gradients before the end of the backward pass: FSDP2 neither adds them to others, nor casts,
        all-reduces or offloads them, and no hook of the user's takes them."""
        group = self.param_group
        dtypes = {parameter.sharded_param.dtype for parameter in group.fsdp_params}
        return (
            group._all_reduce_hook is None
            and (group.mp_policy.reduce_dtype or group.mp_policy.param_dtype or next(iter(dtypes))) in dtypes
            and len(dtypes) == 1
            and all(
                parameter.sharded_param.grad is None
                and not parameter.offload_to_cpu
                and not getattr(parameter.sharded_param, "_post_accumulate_grad_hooks", None)
                for parameter in group.fsdp_params
            )
        )

    def factor(self, op: Any, replicas: int = 1) -> float:
        """What the sum over ranks is multiplied by. FSDP2 asks for an average, a sum, or a sum over the user's divisor.

        replicas: of which the mean follows, where FSDP2 takes the sum if the divisor is the user's.
        """
        divisor = self.param_group.gradient_divide_factor
        again = 1 if divisor is None else replicas
        if op == dist.ReduceOp.AVG:
            return again / self.process_group.size()
        if op == dist.ReduceOp.SUM:
            return float(again)
        return again / float(divisor)

    @property
    def averages(self) -> bool:
        """Whether this backward pass averages over the replicas, or only adds up (set_requires_all_reduce)."""
        return bool(self.param_group.all_reduce_grads)

    def without_gradients(self) -> list[Any]:
        """Its parameters that have none now."""
        sharded = [parameter.sharded_param for parameter in self.param_group.fsdp_params]
        return [parameter for parameter in sharded if parameter.requires_grad and parameter.grad is None]

    def leave_replicas(self) -> Callable[[], None]:
        """FSDP2 no longer averages over the replicas. Returns what lets it do so again."""
        group, before = self.param_group, (self.param_group.mesh_info, self.param_group.post_forward_mesh_info)
        group.mesh_info = FSDPMeshInfo(mesh=before[0].mesh, shard_mesh_dim=before[0].shard_mesh_dim)
        if before[1] is not None:
            group.post_forward_mesh_info = group.mesh_info

        def restore() -> None:
            group.mesh_info, group.post_forward_mesh_info = before

        return restore

    def install(self, all_gather: Any | None, reduce_scatter: Any | None) -> Callable[[], None]:
        """Put ours in the place of FSDP2's; None leaves it. Returns what puts the former ones back."""
        group = self.param_group
        before = group._all_gather_comm, group._reduce_scatter_comm
        if all_gather is not None:
            self.module.set_custom_all_gather(all_gather)
        if reduce_scatter is not None:
            self.module.set_custom_reduce_scatter(reduce_scatter)

        def restore() -> None:
            group._all_gather_comm, group._reduce_scatter_comm = before

        return restore


def prefetch(units: list[Unit], depth: int) -> Callable[[], None]:
    """Each unit asks for the weights of the next `depth` when its own are there; a user's own setting for a unit stays."""
    changed = []
    for index, unit in enumerate(units):
        if not unit.module._get_fsdp_state()._states_to_forward_prefetch:
            unit.module.set_modules_to_forward_prefetch([later.module for later in units[index + 1 : index + 1 + depth]])
            changed.append(unit)

    def restore() -> None:
        for unit in changed:
            unit.module.set_modules_to_forward_prefetch([])

    return restore


def free_gathered(model: nn.Module) -> None:
    """Free the weights that FSDP2 has gathered: only then are the model's parameters the shards, and the next forward pass sees
    what was written to them.

    FSDP2 keeps them after a forward pass that no backward pass follows, as in an evaluation, those of the root at least.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def forget_gradients(model: nn.Module) -> None:
    """Throw away what backward passes without a reduction (set_requires_gradient_sync) have added up on this rank."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):  # after the first pass
                    parameter._unsharded_param.grad = None


def find_units(model: nn.Module) -> list[Unit]:
    """In the order of registration, the root first. UserError for a model or a use of `fully_shard` that is not supported."""
    free_gathered(model)
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    found: list[Unit] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        _check_has(module, "FSDPModule", NEEDED)
        state: Any = module._get_fsdp_state()
        if len(getattr(state, "_fsdp_param_groups", ())) > 1:
            raise UserError(f"unit {path or 'root'} shards its parameters over several meshes; compress_sharded wants one mesh")
        group = state._fsdp_param_group
        if group is None or id(group) in seen:
            continue
        seen.add(id(group))
        _check_has(group, "FSDPParamGroup", GROUP_NEEDED)
        if reason := next(_reasons_against(group), None):
            raise UserError(f"unit {path or 'root'} {reason}")
        listed = [names[id(parameter.sharded_param)] for parameter in group.fsdp_params]
        found.append(Unit(plain_name(f"{path}.").rstrip("."), module, listed, module is model))
    if not found:
        raise UserError("compress_sharded wants a model to which fully_shard was applied, and this one has no such module")
    return found


def _check_has(thing: Any, kind: str, needed: tuple[str, ...]) -> None:
    if missing := [name for name in needed if not hasattr(thing, name)]:
        raise UserError(f"torch {torch.__version__} has no {kind}.{missing[0]}; compress_sharded wants torch 2.11 to 2.15")


def _reasons_against(group: Any) -> Iterator[str]:
    """Why a unit cannot be coded."""
    info, later = group.mesh_info, group.post_forward_mesh_info
    replicated = hasattr(info, "replicate_process_group")
    if not hasattr(info, "shard_process_group") or (replicated and info.shard_process_group.size() == 1):
        yield "is replicated and not sharded; use DistributedDataParallel and compress_gradients, or shard over two ranks or more"
    elif replicated and later not in (None, info):
        yield "is replicated, and reshards to fewer ranks after forward; leave reshard_after_forward True or False there"
    for parameter in group.fsdp_params:
        shard, dim = parameter.sharded_param, parameter.fsdp_placement.dim
        if not (shard.dtype.is_floating_point or shard.dtype.is_complex):
            yield f"has parameters of {shard.dtype}; compress_sharded takes real and complex numbers only"
        if dim != 0:
            yield f"shards a parameter along dim {dim}; compress_sharded wants dim 0"


def _described(name: str, parameter: Any) -> Parameter:
    """As real numbers."""
    shape, dtype = tuple(parameter._orig_size), parameter.sharded_param.dtype
    return Parameter(name, (*shape, 2) if dtype.is_complex else shape, dtype=str(_name_of(dtype)))


def _name_of(dtype: torch.dtype | None) -> str | None:
    """Of the real numbers."""
    return None if dtype is None else str(dtype.to_real()).removeprefix("torch.")
