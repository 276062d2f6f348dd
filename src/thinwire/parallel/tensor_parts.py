"""Which part of each parameter of a `Transformer` a rank of the tensor axis holds. No torch.

With t ranks, N heads of queries and K of keys, each D wide, F hidden and V words, rank r holds

    attention.qkv    rows of its N/t heads of queries, K/t of keys, K/t of values: three ranges of [q | k | v]
    attention.out    columns of the same N/t heads of queries
    mlp.up           F/t rows; with swiglu of gate and of up: two ranges of [gate | up]
    mlp.down         F/t columns
    embed, head      ceil(V/t) rows of the vocabulary. Where there are fewer left, rows of zeros follow as padding, so that all
                     ranks have equal shapes: no token has them, the loss leaves them out, their gradients are zero
    all others       norms and learned positions, whole on each rank

(Shoeybi et al. 2019, section 3.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from thinwire.config.model import ModelConfig
from thinwire.workload import Parameter, Workload, plain_name


@dataclass(frozen=True)
class Part:
    """These ranges of the whole parameter along `dim`, one behind the other; then `padding` zeros, which are none of it.

    whole: the length of the whole parameter along `dim`.
    """

    dim: int
    ranges: tuple[range, ...]
    whole: int
    padding: int = 0

    @property
    def length(self) -> int:
        """Of the local parameter along `dim`."""
        return sum(map(len, self.ranges)) + self.padding

    def local_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the local parameter, from that of the whole one or of another part of it."""
        return (*shape[: self.dim], self.length, *shape[self.dim + 1 :])

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the whole parameter, from that of any part of it."""
        return (*shape[: self.dim], self.whole, *shape[self.dim + 1 :])

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
    halves = [0, config.hidden] if config.mlp == "swiglu" else [0]

    def share(begin: int, length: int) -> range:
        return range(begin + length * rank // degree, begin + length * (rank + 1) // degree)

    block = {
        "attention.qkv.weight": Part(0, (share(0, queries), share(queries, keys), share(queries + keys, keys)), config.qkv_width),
        "attention.out.weight": Part(1, (share(0, queries),), queries),
        "mlp.up.weight": Part(0, tuple(share(begin, config.hidden) for begin in halves), config.up_width),
        "mlp.down.weight": Part(1, (share(0, config.hidden),), config.hidden),
    }
    words = words_of(config.vocabulary, degree, rank)
    rows = Part(0, (words,), config.vocabulary, -(-config.vocabulary // degree) - len(words))
    return {
        "embed.weight": rows,
        **{f"blocks.{index}.{name}": part for index in range(config.layers) for name, part in block.items()},
        **({} if config.tied else {"head.weight": rows}),
    }


def words_of(vocabulary: int, degree: int, rank: int) -> range:
    """The words whose rows a rank holds: as many as are left, at most ceil(V/t)."""
    most = -(-vocabulary // degree)
    return range(min(vocabulary, rank * most), min(vocabulary, (rank + 1) * most))


def local_workload(workload: Workload, config: ModelConfig, degree: int, seq: int = 1) -> Workload:
    """Of one rank of `degree`, all of which have equal shapes, from that of the whole model. seq: ranks that share a sequence."""
    parts = parts_of(config, degree, 0)

    def local(one: Parameter) -> Parameter:
        part = parts.get(plain_name(one.name))
        shape = one.shape if part is None else part.local_shape(one.shape)
        return replace(one, shape=shape, forward_flops_before=one.forward_flops_before / degree)

    return replace(
        workload,
        parameters=tuple(map(local, workload.parameters)),
        forward_flops_per_token=workload.forward_flops_per_token / degree,
        tokens_per_microbatch=workload.tokens_per_microbatch // seq,
    )
