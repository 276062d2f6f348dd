"""Tensor parallelism of thinwire's `Transformer`: the matrices of each layer split over the ranks of one axis, from outside.

Every rank has the whole residual stream x. Each pair of matrices with a nonlinearity between is split so that rank r computes

    y_r = x U_r'       U_r: rows of U, the outputs qkv or up of its heads and hidden values     (column-parallel)
    z   = sum over r of act(y_r) D_r'       D_r: the columns of D that take them, out or down   (row-parallel)

    g, behind D:   forward the sum over ranks of what each has, backward nothing
    f, before U:   forward nothing, backward the sum over ranks of dx_r = dy_r U_r

The embedding is split by words: a rank looks up those it has, zeros for the others, and g adds up. The projection to logits is
split by words too: f before it, logits stay where they are, and the loss is computed on them (`tensor_loss`). Per micro-batch of
B sequences of L tokens, M wide, and n blocks, so many sums of B L M values travel, as they are or coded (`partial_sums`):

    forward    1 (embedding) + 2 n           backward    2 n + 1 (projection)

and three values a token for the loss; backward one sum more for each block that is computed again in full (`recompute`). Sums are
the same bits on all ranks, coded or not, hence so are x, dx and the gradients of norms and positions, which each rank has whole:
they never part. Shoeybi et al. 2019 (Megatron-LM), section 3.

Parameters stay plain tensors under the names that they have in the model; `tensor_parts` says which part of the whole they are.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_reduce
from thinwire.compress.activations.partial_sums import coded_all_reduce, coded_gradient_sum, sum_transfers
from thinwire.compress.base import Codec
from thinwire.compress.speed import CPU, seconds_per_value
from thinwire.compress.twoshot import shard_length
from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.models.transformer import Transformer
from thinwire.parallel.tensor_loss import LOSS, check_words, tensor_cross_entropy
from thinwire.parallel.tensor_parts import Part, kv_heads_of, parts_of, words_of
from thinwire.parallel.tensor_state import cut_out
from thinwire.parallel.waits import Waits
from thinwire.traffic import EVALUATION, Transfer
from thinwire.workload import plain_name

ACTIVATIONS = "activations"
GRADIENTS = "activation gradients"
NORM = "gradient norm"


def apply(
    model: nn.Module,
    group: dist.ProcessGroup,
    ledger: Ledger,
    codec: Codec | None = None,
    waits: Waits = Waits(),  # noqa: B008 (notes nothing)
) -> dict[str, Part]:
    """Leave this rank's part of `model` in it, in place, with new parameters: make optimizers and cut stages afterwards. Local.

    Before, the model must be the same, whole, on all ranks of `group`; from then on all give it the same tokens, and each forward
    and backward pass is collective. codec: of all sums of a training pass; those without gradients are never coded. waits: when
    this rank waited for sums in training passes. Returns which part each split parameter is. UserError for a model that is no
    `Transformer`, or as `ModelConfig.check_tensor`.
    """
    if not isinstance(model, Transformer):
        raise UserError(
            f"a {type(model).__name__} cannot be split over tensor ranks: layout.tensor takes thinwire's Transformer; "
            "train it without layout.tensor"
        )
    config, degree = model.config, group.size()
    parts = parts_of(config, degree, group.rank())
    if degree == 1:
        return {}
    ledger.axes[group.group_name] = "tensor"
    sums = Sums(group, ledger, codec, waits)
    for name, part in parts.items():
        keep(model.get_submodule(name.removesuffix(".weight")), part)
    model.embed = SplitEmbedding(model.embed, words_of(config.vocabulary, degree, group.rank()), config.vocabulary, sums)
    heads, blocks = kv_heads_of(config, degree, group.rank()), cast(Any, model.blocks)
    for block in blocks:
        attention, mlp = block.attention, block.mlp
        attention.heads = len(heads) * config.heads // config.kv_heads
        attention.kv_heads = len(heads)
        for enters in (attention.qkv, mlp.up):
            enters.register_forward_pre_hook(lambda _, arguments: (sums.of_gradients(arguments[0]),))
        for leaves in (attention.out, mlp.down):
            leaves.register_forward_hook(lambda _, arguments, output: sums.of_activations(output))
    model.norm.register_forward_hook(lambda _, arguments, output: sums.of_gradients(output))
    model.loss = tensor_cross_entropy(group, ledger, config.vocabulary, waits)
    return parts


@dataclass
class Sums:
    """g and f. Where only shapes are wanted, of fake tensors, nothing is sent."""

    group: dist.ProcessGroup
    ledger: Ledger
    codec: Codec | None
    waits: Waits

    def of_activations(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor):
            return x
        if not torch.is_grad_enabled():
            return coded_all_reduce(x, self.group, None, self.ledger, EVALUATION)
        with self.waits.wait():
            return coded_all_reduce(x, self.group, self.codec, self.ledger, self.waits.label(ACTIVATIONS))

    def of_gradients(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor) or not torch.is_grad_enabled():
            return x
        y = coded_gradient_sum(x, self.group, self.codec, self.ledger, self.waits.label(GRADIENTS))
        if x.requires_grad and self.waits.clock is not None:  # going back, y comes before the sum and x behind it
            begun: list[Any] = []
            y.register_hook(lambda _: begun.append(self.waits.begin()))
            x.register_hook(lambda _: self.waits.end(begun.pop()) if begun else None)  # zero bubble passes here twice
        return y


class SplitEmbedding(nn.Embedding):
    """Some words' rows of an embedding; what it gives is the whole one's."""

    def __init__(self, rows: nn.Embedding, words: range, vocabulary: int, sums: Sums) -> None:
        super().__init__(rows.weight.shape[0], rows.weight.shape[1], _weight=rows.weight)
        self.weight = rows.weight
        pad = rows.padding_idx
        self._pad = pad - words.start if pad is not None and pad in words else None
        self._words, self._vocabulary, self._sums = words, vocabulary, sums

    def forward(self, tokens_BL: Tensor) -> Tensor:
        if not isinstance(tokens_BL, FakeTensor):
            check_words(tokens_BL, self._vocabulary)
        elsewhere_BL = (tokens_BL < self._words.start) | (tokens_BL >= self._words.stop)
        x_BLM = F.embedding((tokens_BL - self._words.start).masked_fill(elsewhere_BL, 0), self.weight, self._pad)
        return self._sums.of_activations(x_BLM.masked_fill(elsewhere_BL[..., None], 0.0))


def keep(module: Any, part: Part) -> None:
    """The part of the module's weight stays in it."""
    module.weight = nn.Parameter(cut_out(module.weight.detach(), part), requires_grad=module.weight.requires_grad)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


@torch.no_grad()
def gradient_norm(
    named: Iterable[tuple[str, nn.Parameter]],
    parts: Container[str],
    group: dist.ProcessGroup,
    ledger: Ledger,
    shards: dist.ProcessGroup | None = None,
) -> Tensor:
    """The norm of the whole model's gradient, [], for torch's `clip_grads_with_norm_`; the same bits on all ranks of `group`.

    parts: names of what is split, which is added up over the ranks; what each has whole counts once. shards: of ranks that each
    have rows of all of it. In float32, or float64 of float64. Collective.
    """
    split: list[Tensor] = []
    whole: list[Tensor] = []
    for name, parameter in named:
        if parameter.grad is not None:
            precise = torch.promote_types(parameter.grad.dtype, torch.float32)
            square = torch.linalg.vector_norm(parameter.grad, dtype=precise).square()
            (split if plain_name(name) in parts else whole).append(square)
    sums = torch.stack([torch.stack(squares).sum() if squares else (split + whole)[0] * 0 for squares in (split, whole)])
    if shards is not None:
        all_reduce(sums, shards, ledger, NORM).wait()
    if split:
        all_reduce(sums[:1], group, ledger, NORM).wait()
    return sums.sum().sqrt()


def norm_transfers(axis: str, kept: torch.dtype) -> list[Transfer]:
    """What `gradient_norm` sends over an axis, of gradients in `kept`."""
    item = torch.promote_types(kept, torch.float32).itemsize
    size = item * (2 if axis == "shard" else 1)
    return [Transfer(label=NORM, axis=axis, op="all_reduce", message_bytes=size, item_bytes=item)]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What a rank computes in a step.

    units: of `chain_of(model)` that are its; None: all. casts: autocast multiplies in bfloat16. clips: with `gradient_norm`.
    evaluates: without gradients, so plain and forward only. device: on which it is coded. recomputed: "selective" or "full"
    by unit, of those that are computed again.
    """

    micro_batch: int
    sequence: int
    num_micro: int = 1
    units: Sequence[int] | None = None
    casts: bool = False
    clips: bool = False
    evaluates: bool = False
    device: torch.device = CPU
    recomputed: Mapping[int, str] = field(default_factory=dict)


def traffic(config: ModelConfig, degree: int, passes: Passes, codec: Codec | None = None) -> list[Transfer]:
    """What a rank sends over the axis for it, exactly. Coding is timed here."""
    if degree == 1:
        return []
    last = config.layers + 1
    units = range(last + 1) if passes.units is None else passes.units
    again = 0 if passes.evaluates else sum(passes.recomputed.get(unit) == "full" for unit in units)
    blocks, embeds, projects = sum(0 < unit < last for unit in units), int(0 in units), int(last in units)
    kept: torch.dtype = getattr(torch, config.dtype)
    product = torch.bfloat16 if passes.casts else kept
    codec = None if passes.evaluates else codec
    tokens = passes.micro_batch * passes.sequence
    work_s = (0.0, 0.0) if codec is None else _coding_s(codec, tokens * config.width, degree, passes.device)
    sent = [
        replace(transfer, calls=calls * passes.num_micro, in_passes=True, work_s=coding_s)
        for label, dtype, calls in (
            (ACTIVATIONS, kept, embeds),
            (ACTIVATIONS, product, 2 * blocks + again),
            (GRADIENTS, kept, 0 if passes.evaluates else 2 * blocks + projects),
        )
        for transfer, coding_s in zip(
            sum_transfers((tokens * config.width, dtype), codec, "tensor", degree, label), work_s, strict=False
        )
        if calls
    ]
    if projects:
        item = torch.promote_types(product, torch.float32).itemsize
        for values in (1, 2):
            size = values * tokens * item
            sent.append(
                Transfer(
                    label=LOSS,
                    axis="tensor",
                    op="all_reduce",
                    message_bytes=size,
                    item_bytes=item,
                    calls=passes.num_micro,
                    in_passes=True,
                )
            )
    if passes.clips:
        sent += norm_transfers("tensor", kept)
    return [replace(transfer, label=EVALUATION) for transfer in sent] if passes.evaluates else sent


def _coding_s(codec: Codec, numel: int, degree: int, device: torch.device) -> tuple[float, float]:
    """On one rank, for one sum of `numel` values: of the codes, and of the sums (`partial_sums`)."""
    length = shard_length((numel,), degree, codec.block)
    encode_s, decode_s = seconds_per_value(codec, device)
    return (degree - 1) * length * encode_s, length * (encode_s + (2 * degree - 1) * decode_s)
