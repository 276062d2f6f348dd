"""Text from a `Transformer`, token by token, keys and values kept: by one rank, or by the stages of a pipeline and the ranks of a
tensor axis together.

    next token = argmax over words v of z_v                      temperature 0: greedy
                 argmax over words v of z_v / T + g_v            temperature T, g_v = -log(-log u_v), u_v uniform in (0, 1)

which draws from softmax(z / T) (Gumbel 1954). u depends on the seed and on how many tokens were drawn before, and the sum is
taken in float64 on the CPU. So a seed gives the same text in every layout, unless two words are closer than rounding.

The prompt goes through the model once, then each token alone. Activations travel from stage to stage as they are, the chosen
token from the last rank of the pipeline to all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_gather
from thinwire.config.pipeline import PipelineSection
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.models.transformer import Transformer, causal_attention
from thinwire.parallel.apply import Asked, apply
from thinwire.parallel.chain import Owner, Shared
from thinwire.parallel.cut import cut_model
from thinwire.workload import Workload

LABEL = "generation"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature: 0 takes the likeliest word. top_k: only of so many likeliest; 0: of all."""

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The groups of this rank; None: the axis is not used."""

    pipe: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None
    ledger: Ledger


class _KeepingAttention:
    """`causal_attention` of the latest tokens to all that came before, whose keys and values are kept."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
        if self._kept is None:
            self._kept = k_BKLD, v_BKLD
            return causal_attention(q_BNLD, k_BKLD, v_BKLD)
        k_BKTD, v_BKTD = (torch.cat(both, dim=2) for both in zip(self._kept, (k_BKLD, v_BKLD), strict=True))
        self._kept = k_BKTD, v_BKTD
        length, seen = q_BNLD.shape[2], k_BKTD.shape[2]
        mask_LT = torch.ones(length, seen, dtype=torch.bool, device=q_BNLD.device).tril(seen - length)
        return F.scaled_dot_product_attention(q_BNLD, k_BKTD, v_BKTD, mask_LT if length > 1 else None, enable_gqa=True)


class Generator:
    """Of one text. Made and called on every rank of the axes alike; each gets the tokens."""

    def __init__(self, model: Transformer, sampling: Sampling, axes: Axes | None = None) -> None:
        """model: whole, alike on all ranks, on the device where it is to run; it is cut in place. UserError for a model that the
        axes cannot share."""
        self._axes, self._sampling, self._config = axes or Axes(ledger=Ledger()), sampling, model.config
        if self._axes.tensor is not None:
            groups = {"tensor": self._axes.tensor}
            layout = Layout(tensor=self._axes.tensor.size())
            apply(model, Asked(layout=layout, groups=groups, ledger=self._axes.ledger, config=RunConfig()))
        pipe = self._axes.pipe
        self._ranks, self._rank = (1, 0) if pipe is None else (pipe.size(), pipe.rank())
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        costs = Workload.of_transformer(model.config, 1, 1).chain_flops_per_token
        example = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        cut = cut_model(model, example, PipelineSection(), self._ranks, costs)
        self._units = [cut.chain[index] for index in cut.stages[self._rank]]
        self._owner = Owner(model, cut.modules_of(self._rank))
        blocks: Any = model.blocks
        for block in blocks:
            block.attention.attend = _KeepingAttention()
        self._random = torch.Generator().manual_seed(sampling.seed)
        self._length = 0

    def tokens(self, prompt: Sequence[int], most: int, end: int | None = None) -> Iterator[int]:
        """At most so many tokens behind `prompt`; not `end`, behind which there are none. Once for each generator. UserError for
        an empty prompt, or one that leaves no room in the context."""
        if not prompt:
            raise UserError("the prompt is empty; a text begins with a token at least")
        if len(prompt) + most > self._config.context:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and {most} more are above the model's context of {self._config.context}; "
                f"ask for {max(0, self._config.context - len(prompt))} tokens or fewer"
            )
        given = list(prompt)
        for _ in range(most):
            token = self._next(given)
            if token == end:
                return
            yield token
            given = [token]

    @torch.no_grad()
    def _next(self, given: list[int]) -> int:
        x = torch.tensor([given], device=self._device)
        shared: Shared = {"position_L": torch.arange(self._length, self._length + len(given), device=self._device)}
        pipe, ledger = self._axes.pipe, self._axes.ledger
        with ledger.label(LABEL):
            if self._rank > 0:
                x = torch.empty(1, len(given), self._config.width, dtype=self._dtype, device=self._device)
                dist.recv(x, group=pipe, group_src=self._rank - 1)
            *units, last = self._units
            for unit in units:
                x = unit.run(self._owner, x, shared)
            is_last = self._rank == self._ranks - 1
            x = last.run(self._owner, x[:, -1:] if is_last else x, shared)  # only the last position says what comes next
            if not is_last:
                dist.send(x.contiguous(), group=pipe, group_dst=self._rank + 1)
            chosen = torch.tensor([self._choose(x[0, -1]) if is_last else 0], device=self._device)
            if pipe is not None:
                dist.broadcast(chosen, group=pipe, group_src=self._ranks - 1)
        self._length += len(given)
        return int(chosen)

    def _choose(self, logits_V: Tensor) -> int:
        """logits_V: of this rank's words."""
        if (group := self._axes.tensor) is not None:
            own, logits_V = logits_V.contiguous(), logits_V.new_empty(group.size() * len(logits_V))
            all_gather(logits_V, own, group, self._axes.ledger, LABEL).wait()
        z_V = logits_V[: self._config.vocabulary].double().cpu()  # behind them is padding
        if not self._sampling.temperature:
            return int(z_V.argmax())
        if 0 < self._sampling.top_k < len(z_V):
            z_V[z_V < z_V.topk(self._sampling.top_k).values[-1]] = -torch.inf
        u_V = torch.rand(len(z_V), dtype=torch.float64, generator=self._random)
        return int((z_V / self._sampling.temperature - (-u_V.log()).log()).argmax())
