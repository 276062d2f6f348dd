"""Where and when an optimizer's step is made, for less memory on a device: parameter by parameter.

    early      in the backward pass, behind each parameter's gradient, which is given up then (Lv et al. 2023, LOMO,
               arXiv 2306.09782): of all gradients one is there at a time
    on host    state lies in pinned memory of the host; a step fetches it for some parameters while it moves others, and gives it
               back (Ren et al. 2021, ZeRO-Offload, arXiv 2101.06840, which makes the step on the host too)

Activations that a forward pass keeps may lie on the host as well; the backward pass waits for each to come back. All copies are
exact, so nothing else changes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.errors import UserError
from thinwire.plan.memory import PIECE_BYTES
from thinwire.sync.again import having
from thinwire.sync.host_memory import HostMemory

LEAST_KEPT_BYTES = 2**16
"""Smaller activations stay."""


@contextmanager
def early(optimizer: torch.optim.Optimizer, *, moves: bool = True) -> Iterator[None]:
    """Around passes: behind them nothing is left to update, and no gradient. moves: else gradients are thrown away. Local."""
    handles = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            alone = {**group, "params": [parameter]}
            handles.append(parameter.register_post_accumulate_grad_hook(partial(_update, optimizer, alone if moves else None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _update(optimizer: torch.optim.Optimizer, group: dict[str, Any] | None, parameter: Tensor) -> None:
    if group is not None:
        with having(optimizer, [group]):
            optimizer.step()
    parameter.grad = None


def keep_on_host(optimizer: torch.optim.Optimizer, piece_bytes: int = PIECE_BYTES) -> None:
    """From now on the state of `optimizer`, of parameters on one device, lies on the host between its steps. Local."""
    memory, whole_step = HostMemory(optimizer.param_groups[0]["params"][0].device), optimizer.step
    places: dict[tuple[Tensor, str], Tensor] = {}
    """By parameter and name of the state."""

    def fetch(piece: Sequence[dict[str, Any]]) -> None:
        for state, key in _states(optimizer, piece):
            if key in places and state[key[1]] is places[key]:
                state[key[1]] = memory.fetched(places[key])

    def give_back(piece: Sequence[dict[str, Any]]) -> None:
        for state, key in _states(optimizer, piece):
            if key in places and places[key].shape == state[key[1]].shape and places[key].dtype == state[key[1]].dtype:
                memory.store(state[key[1]], places[key])
            else:
                places[key] = memory.taken(state[key[1]])
            state[key[1]] = places[key]

    @torch.no_grad()
    def step(closure: Callable[[], Any] | None = None) -> None:
        pieces = _pieces(optimizer.param_groups, piece_bytes)
        fetch(pieces[0])
        for piece, following in zip(pieces, [*pieces[1:], []], strict=True):
            memory.arrive()
            fetch(following)
            with having(optimizer, piece):
                whole_step()
            give_back(piece)
        memory.settle()  # a checkpoint may read them

    optimizer.step = step  # type: ignore[method-assign, assignment]
    optimizer.register_load_state_dict_post_hook(lambda _: give_back(optimizer.param_groups))


def _states(optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Tensors, but for single numbers: the dict that each is in, and its (parameter, name)."""
    for parameter in (one for group in groups for one in group["params"]):
        state = optimizer.state.get(parameter, {})
        for name in [name for name, value in state.items() if isinstance(value, Tensor) and value.dim()]:
            yield state, (parameter, name)


def _pieces(groups: Sequence[dict[str, Any]], piece_bytes: int) -> list[list[dict[str, Any]]]:
    """Groups of some parameters each."""
    pieces: list[list[dict[str, Any]]] = [[]]
    size = 0
    for group in groups:
        for parameter in group["params"]:
            if size and size + parameter.nbytes > piece_bytes:
                pieces.append([])
                size = 0
            size += parameter.nbytes
            if not pieces[-1] or pieces[-1][-1]["of"] is not group:
                pieces[-1].append({**group, "params": [], "of": group})
            pieces[-1][-1]["params"].append(parameter)
    return pieces


@contextmanager
def activations_on_host(device: torch.device, inside: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[None]:
    """Around a forward pass, which is in `inside` too: what it keeps for the backward pass lies on the host, but for weights and
    what is small."""
    memory = HostMemory(device)

    def pack(tensor: Tensor) -> Any:
        stays = tensor.nbytes < LEAST_KEPT_BYTES or tensor.device.type != device.type or _is_of_weights(tensor)
        return tensor if stays else (memory.taken(tensor),)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        values = memory.fetched(*packed)
        memory.arrive()
        return values

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), inside():
        yield


def _is_of_weights(tensor: Tensor) -> bool:
    """A parameter, a view of one, or one in another dtype."""
    if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
        return True
    made: Any = tensor.grad_fn
    while made is not None and len(made.next_functions) == 1:
        made = made.next_functions[0][0]
        if hasattr(made, "variable"):
            return True
    return False


def check_on_host(wanted: Sequence[str], device: torch.device) -> None:
    """UserError on a CPU, which has no other memory."""
    if wanted and device.type == "cpu":
        raise UserError(f"train.on_host = {list(wanted)}: this rank's device is a CPU, whose memory is the host's; leave it out")
