"""Which part of each parameter of a `Transformer` a rank of the tensor axis holds. No torch.

With t ranks, N heads of queries and K of keys, each D wide, M width, F hidden and V words, rank r holds

    attention.qkv    rows of its K_r heads of keys and values, and of the N/K heads of queries of each: three of [q | k | v]
    attention.out    columns of the same heads of queries
    mlp.up           F_r rows; with swiglu of gate and of up: two ranges of [gate | up]
    mlp.down         F_r columns
    embed, head      ceil(V/t) rows of the vocabulary. Where there are fewer left, rows of zeros follow as padding, so that all
                     ranks have equal shapes: no token has them, the loss leaves them out, their gradients are zero
    all others       norms and learned positions, whole on each rank

t need not divide K or F. Ranks before K mod t have one head of keys more than the others, and fewer hidden values for it, so that
all have about as many parameters of a block:

    K_r = floor(K / t), and one more if r < K mod t              A_r = K_r (2 N/K + 2) D M, a rank's of attention
    F_r = 1 + (F - t) w_r / sum of w, in whole numbers           w_r = max(0, (sum of A + m F M) / t - A_r),  m = 3 (swiglu) or 2

Where t divides both that is K/t and F/t. The first rank has the most of attention, but not always of everything.
(Shoeybi et al. 2019, section 3.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from thinwire.config.model import ModelConfig
from thinwire.workload import Parameter, Workload, plain_name


@dataclass(frozen=True)
class Part:
    """These ranges of the whole parameter along `dim`, one behind the other; then `padding` zeros, which are none of it.

    whole: the length of the whole parameter along `dim`. across: what of it along another dim, None: all.
    """

    dim: int
    ranges: tuple[range, ...]
    whole: int
    padding: int = 0
    across: "Part | None" = None

    @property
    def length(self) -> int:
        """Of the local parameter along `dim`."""
        return sum(map(len, self.ranges)) + self.padding

    def local_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the local parameter, from that of the whole one or of another part of it."""
        local = (*shape[: self.dim], self.length, *shape[self.dim + 1 :])
        return self.across.local_shape(local) if self.across else local

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the whole parameter, from that of any part of it along the same dims."""
        whole = (*shape[: self.dim], self.whole, *shape[self.dim + 1 :])
        return self.across.whole_shape(whole) if self.across else whole

    def along(self, dim: int, length: int) -> tuple[range, ...]:
        """What it has along any dim, of so many places of the whole parameter there."""
        if dim == self.dim:
            return self.ranges
        return self.across.along(dim, length) if self.across else (range(length),)

    def held(self, shape: Sequence[int]) -> int:
        """Values of the whole parameter, of that shape, that it has: of the local one, but for padding."""
        return math.prod(sum(map(len, self.along(dim, length))) for dim, length in enumerate(shape))

    @property
    def everything(self) -> "Part":
        """The part that is the whole parameter."""
        return Part(self.dim, (range(self.whole),), self.whole)


Parts = Mapping[str, Part]
"""By name of the parameter in the model; what is not named is whole on each rank."""


def parts_of(config: ModelConfig, degree: int, rank: int) -> dict[str, Part]:
    """Of rank `rank` of `degree`. UserError as `ModelConfig.check_tensor`."""
    config.check_tensor(degree)
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    heads, hidden = kv_heads_of(config, degree, rank), _hidden_of(config, degree, rank)

    def rows(begin: int, width: int) -> range:
        return range(begin + heads.start * width, begin + heads.stop * width)

    asked = rows(0, queries // config.kv_heads)
    key, value = (rows(begin, config.head_width) for begin in (queries, queries + keys))
    up = (hidden, range(config.hidden + hidden.start, config.hidden + hidden.stop)) if config.mlp == "swiglu" else (hidden,)
    block = {
        "attention.qkv.weight": Part(0, (asked, key, value), config.qkv_width),
        "attention.out.weight": Part(1, (asked,), queries),
        "mlp.up.weight": Part(0, up, config.up_width),
        "mlp.down.weight": Part(1, (hidden,), config.hidden),
    }
    words = words_of(config.vocabulary, degree, rank)
    vocabulary = Part(0, (words,), config.vocabulary, -(-config.vocabulary // degree) - len(words))
    return {
        "embed.weight": vocabulary,
        **{f"blocks.{index}.{name}": part for index in range(config.layers) for name, part in block.items()},
        **({} if config.tied else {"head.weight": vocabulary}),
    }


def kv_heads_of(config: ModelConfig, degree: int, rank: int) -> range:
    """The heads of keys and values that a rank has."""
    each, more = divmod(config.kv_heads, degree)
    return range(rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more))


def _hidden_of(config: ModelConfig, degree: int, rank: int) -> range:
    """The hidden values that a rank has; see the top of the file."""
    attention = (2 * config.heads + 2 * config.kv_heads) * config.head_width
    whole = attention + (3 if config.mlp == "swiglu" else 2) * config.hidden
    heads = (len(kv_heads_of(config, degree, one)) for one in range(degree))
    room = [max(0, config.kv_heads * whole - degree * attention * one) for one in heads]
    begin, end = ((config.hidden - degree) * sum(room[:ranks]) // sum(room) + ranks for ranks in (rank, rank + 1))
    return range(begin, end)


def words_of(vocabulary: int, degree: int, rank: int) -> range:
    """The words whose rows a rank holds: as many as are left, at most ceil(V/t)."""
    most = -(-vocabulary // degree)
    return range(min(vocabulary, rank * most), min(vocabulary, (rank + 1) * most))


def local_workload(workload: Workload, config: ModelConfig, degree: int, rank: int = 0, seq: int = 1) -> Workload:
    """Of rank `rank` of `degree`, from that of the whole model. Of attention it computes what its heads are of all. seq: ranks
    that share a sequence."""
    parts = parts_of(config, degree, rank)
    before = [*(one.forward_flops_before for one in workload.parameters), workload.forward_flops_per_token]
    done, local = 0.0, list[Parameter]()
    for one, (begin, end) in zip(workload.parameters, pairwise(before), strict=True):
        part = parts.get(plain_name(one.name))
        local.append(replace(one, shape=part.local_shape(one.shape) if part else one.shape, forward_flops_before=done))
        words = parts["embed.weight"]  # behind the last norm, which is whole, runs the projection to them
        done += (end - begin) * (part or words).length / (part or words).whole
    tokens = workload.tokens_per_microbatch // seq
    return replace(workload, parameters=tuple(local), forward_flops_per_token=done, tokens_per_microbatch=tokens)
