"""Parameters, optimizer states and objects, the same on all ranks."""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from thinwire.adapters.horovod.context import CONTEXT
from thinwire.adapters.horovod.members import ProcessSet
from thinwire.horovod.torch.calls import global_process_set
from thinwire.horovod.torch.mpi_ops import broadcast_, broadcast_async_, grouped_allgather


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[Any], root_rank: int, process_set: ProcessSet = global_process_set
) -> None:
    """Tensors of rank `root_rank` into those of all ranks: a state_dict, named_parameters() or parameters().

    What is no tensor in a state_dict stays each rank's own. ValueError for what is none of these.
    """
    if isinstance(params, Mapping):
        named = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, torch.Tensor):
        named = [one if isinstance(one, tuple) else (None, one) for one in params]
    else:
        raise ValueError(f"broadcast_parameters: {type(params).__name__} is no state_dict and holds no parameters")
    tensors = [(name, one) for name, one in named if isinstance(one, torch.Tensor)]
    handles = [broadcast_async_(one, root_rank, name, process_set) for name, one in tensors]
    for handle in handles:
        handle.value()


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: Any = None, process_set: ProcessSet = global_process_set
) -> None:
    """State and options (learning rates, ...) of rank `root_rank`'s optimizer into those of all ranks. model: not needed.

    ValueError for LBFGS, whose state is that of one rank.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("broadcast_optimizer_state: the state of torch.optim.LBFGS cannot be broadcast")
    root = CONTEXT.rank() == root_rank
    state = broadcast_object(optimizer.state_dict() if root else None, root_rank, process_set=process_set)
    if not root:
        optimizer.load_state_dict(state)


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set) -> Any:
    """`obj` of rank `root_rank`, which can be pickled; the others' does not matter. Tensors arrive on the CPU."""
    packed = _pickled(obj) if CONTEXT.rank() == root_rank else torch.empty(0, dtype=torch.uint8)
    size = broadcast_(torch.tensor([len(packed)]), root_rank, name and f"{name}.size", process_set)
    sent = packed if CONTEXT.rank() == root_rank else torch.empty(int(size), dtype=torch.uint8)
    broadcast_(sent, root_rank, name, process_set)
    return obj if CONTEXT.rank() == root_rank else _read(sent)


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """The `obj` of all ranks, in their order. Tensors arrive on the CPU."""
    packed = _pickled(obj)
    sizes, gathered = grouped_allgather([torch.tensor([len(packed)]), packed], name, process_set)
    return [_read(one) for one in gathered.split(sizes.tolist())]


def _pickled(obj: Any) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(obj, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _read(packed: torch.Tensor) -> Any:
    """From a rank of this program, which is trusted as its gradients are."""
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=False)
