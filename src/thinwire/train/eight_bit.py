"""AdamW whose moments are kept in 8 bits, in blocks (Dettmers et al. 2022, arXiv 2110.02861): of float32 ones nearly a quarter.

    scale      of each block of 256 values the largest magnitude s, in the parameter's dtype
    code       first moment x:   c = sign(x) round(127 sqrt(|x| / s)),   decoded s c |c| / 127^2
               second moment x:  c = round(255 (x / s)^(1/4)),           decoded s (c / 255)^4

so that small values keep their size: what is not 0 goes down to 1.5e-5 of the largest of its block, and to 1.5e-11.

A step decodes some values at a time, moves them as `torch.optim.AdamW` does, and codes what has come out. Parameters of fewer
than 4096 values keep their moments as they are. All of it goes value by value or block by block, so that replicas stay equal.

What others see, and a checkpoint holds, are decoded moments under AdamW's names: a run may go on with either kind, in any layout.
Since the largest of a block is decoded exactly, decoding and coding again gives the same codes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.adamw import adamw

from thinwire.workload import LEAST_CODED_STATE
from thinwire.workload import STATE_BLOCK as BLOCK

CHUNK = 2**16
"""Values that are decoded at a time: as many as stay in a cache."""
SCALE = "_scale"
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""AdamW's, and whether they have a sign."""


def encode(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """values: [n], floating point; not signed: none below 0 -> codes [n] int8 or uint8, scales [ceil(n / BLOCK)] of its dtype."""
    blocks = pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    share = blocks.to(_wide(values)) / scales.clamp_min(torch.finfo(values.dtype).tiny).to(_wide(values)).unsqueeze(1)
    if signed:
        codes = share.abs().sqrt_().mul_(127).round_().copysign_(share).to(torch.int8)
    else:
        codes = share.sqrt_().sqrt_().mul_(255).round_().to(torch.uint8)
    return codes.view(-1)[: len(values)], scales


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The reverse of `encode`, [n] of the dtype of the scales."""
    share = pad(codes, (0, -len(codes) % BLOCK)).to(_wide(scales)).view(-1, BLOCK)
    share = share.div_(127).mul_(share.abs()) if signed else share.div_(255).square_().square_()
    return share.mul_(scales.to(share.dtype).unsqueeze(1)).view(-1)[: len(codes)].to(scales.dtype)


def _wide(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


class AdamW8bit(torch.optim.AdamW):
    """See the top of the file. Parameters are real and contiguous, on any device. Options: as of `torch.optim.AdamW`."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.register_state_dict_post_hook(_decoded)
        self.register_load_state_dict_post_hook(_encoded)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter)
            _keep_coded(state)
        values, gradient = parameter.view(-1), parameter.grad
        assert gradient is not None
        gradient = gradient.reshape(-1)
        size = CHUNK if _is_coded(state) else max(1, len(values))
        for first in range(0, len(values), size):
            here, blocks = slice(first, first + size), slice(first // BLOCK, -(-(first + size) // BLOCK))
            moments = {name: state[name].view(-1)[here] for name in MOMENTS}
            if _is_coded(state):
                moments = {
                    name: decode(codes, state[name + SCALE][blocks], signed=MOMENTS[name]) for name, codes in moments.items()
                }
            _adamw(values[here], gradient[here], moments, state["step"].clone(), group)
            if _is_coded(state):
                for name, moment in moments.items():
                    codes, scales = encode(moment, signed=MOMENTS[name])
                    state[name].view(-1)[here], state[name + SCALE][blocks] = codes, scales
        state["step"] += 1


def _adamw(values: Tensor, gradient: Tensor, moments: dict[str, Tensor], step: Tensor, group: dict[str, Any]) -> None:
    """In place, as torch does it."""
    adamw(
        [values],
        [gradient],
        [moments["exp_avg"]],
        [moments["exp_avg_sq"]],
        [],
        [step],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _is_coded(state: dict[str, Any]) -> bool:
    return "exp_avg" + SCALE in state


def _keep_coded(state: dict[str, Any]) -> None:
    """Of a parameter with moments as AdamW has them, if there are enough."""
    for name, signed in MOMENTS.items():
        if state[name].numel() >= LEAST_CODED_STATE:
            codes, scales = encode(state[name].reshape(-1), signed=signed)
            state[name], state[name + SCALE] = codes.view(state[name].shape), scales


def _decoded(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any]:
    """Onto the host, where they have room."""
    state = {}
    for key, one in found["state"].items():
        state[key] = dict(one)
        for name, signed in MOMENTS.items() if _is_coded(one) else ():
            scales = state[key].pop(name + SCALE).cpu()
            state[key][name] = decode(one[name].view(-1).cpu(), scales, signed=signed).view(one[name].shape)
    return {**found, "state": state}


def _encoded(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        if state:
            _keep_coded(state)
