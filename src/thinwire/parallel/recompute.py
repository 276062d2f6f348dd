"""Activations computed again in the backward pass, rather than kept for it: less memory for more operations.

    selective    a block keeps what its two norms get and give; attention and MLP are computed again, each for its own gradients
    full         a block keeps what it gets, and is computed again as a whole

Computing again ends where the backward pass has all that it wants, before the last product. So what is computed again is

    selective    qkv, attention, up                of tensor ranks, no sum travels again
    full         those, and out                    the sum behind out travels again

The same operations on the same numbers give the same bits, coded sums too, whose rounding is none of chance; so do gradients.
A pass that computes gradients of inputs and of weights apart (zero bubble) would compute everything again twice: refused
(`RunConfig`). Chen et al. 2016 (arXiv 1604.06174); Korthikanti et al. 2022 (arXiv 2205.05198), whose "selective" drops the scores
of attention, which kernels do not keep any more.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def apply(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Let blocks of a `Transformer` compute again in their backward passes; in place, after `tensor.apply`, before a cut into
    stages. kinds: "selective" or "full", by the block's name. Parameters and what is given stay as they are. Local."""
    for name, kind in kinds.items():
        block: Any = model.get_submodule(name)
        for module in (block,) if kind == "full" else (block.attention, block.mlp):
            module.forward = _again(module.forward)


def _again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        output: Tensor = checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
        return output

    return run
