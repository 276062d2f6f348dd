"""Activations computed again in the backward pass, rather than kept for it: less memory for more operations.

    selective    a block keeps what its two norms get and give; attention and MLP are computed again, each for its own gradients
    full         a block keeps what it gets, and is computed again as a whole

Computing again ends where the backward pass has all that it wants, before the last product. So what is computed again is

    selective    qkv, attention, up                of tensor ranks, no sum travels again
    full         those, and out                    the sum behind out travels again
    either       of ranks of a sequence, their keys and values; of experts all, whose slots travel again

The same operations on the same numbers give the same bits, coded sums too, whose rounding is none of chance; so do gradients.
A pass that computes gradients of inputs and of weights apart (zero bubble) would compute everything again twice: refused
(`RunConfig`). Chen et al. 2016 (arXiv 1604.06174); Korthikanti et al. 2022 (arXiv 2205.05198), whose "selective" drops the scores
of attention, which kernels do not keep any more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinwire.models.experts import Experts


def apply(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Let blocks of a `Transformer`, or other modules in full, compute again in their backward passes; in place, after
    `tensor.apply`, before a cut into stages. kinds: "selective" or "full", by the module's name. Parameters and what is given
    stay as they are. Local."""
    for name, kind in kinds.items():
        block: Any = model.get_submodule(name)
        for module in (block,) if kind == "full" else (block.attention, block.mlp):
            experts = [one for one in module.modules() if isinstance(one, Experts)]
            module.forward = _again(module.forward, experts)


def units_of(kinds: Mapping[str, str]) -> dict[int, str]:
    """The same, by number in `chain.transformer_chain`."""
    return {int(name.split(".")[1]) + 1: kind for name, kind in kinds.items()}


@contextmanager
def _without_balance(experts: Sequence[Experts]) -> Iterator[None]:
    """Around computing again: what it finds of the balance was taken in the first pass, and would hold all behind it."""
    try:
        yield
    finally:  # computing again ends by an exception
        for one in experts:
            one._balance = None


def _again(forward: Callable[..., Tensor], experts: Sequence[Experts]) -> Callable[..., Tensor]:
    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        """Of the first pass, and of computing again."""
        return nullcontext(), _without_balance(experts)

    def run(*arguments: Any, **named: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        call = partial(forward, **named)
        output: Tensor = checkpoint(
            call, *arguments, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
        )  # nothing is drawn
        return output

    return run
