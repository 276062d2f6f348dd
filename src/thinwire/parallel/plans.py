"""Causal language models of Hugging Face's transformers, by the plans that they carry: split matrices, and chains for pipelines.

`_tp_plan` says of modules how their matrices are split over t ranks (f and g as in `tensor`):

    colwise, rowwise                 rows of the weight and of the bias, f before, once for all that take the same input;
                                     columns, g behind, the whole bias after it
    embedding_rowwise                words; a rank looks up those it has, g adds up
    colwise_gather_output            words of the head; f before; the logits stay where they are and the loss is computed on
                                     them, or they are gathered where the loss is the user's: B L V/t values to each rank
    replicated_with_grad_allreduce   whole on each rank, over its heads; gradients are added up over the ranks

`_pp_plan` names the embedding, the list of layers, the last norm and the head. A layer gets what the model's own forward gives it
where nothing is masked but the future; whether the chain computes what the model does is tried on a few tokens.

What a micro-batch sends is found by a pass of fake tensors, unit by unit of the chain, in which sums note their size.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_reduce
from thinwire.compress.activations.partial_sums import sum_transfers
from thinwire.compress.base import Codec
from thinwire.errors import UserError
from thinwire.parallel.chain import Chain, Shared, Unit, boundaries
from thinwire.parallel.tensor import ACTIVATIONS, GRADIENTS, SplitEmbedding, Sums, keep
from thinwire.parallel.tensor_boundary import Gather
from thinwire.parallel.tensor_loss import LOSS, tensor_cross_entropy
from thinwire.parallel.tensor_parts import Part, words_of
from thinwire.parallel.waits import Waits
from thinwire.traffic import EVALUATION, Transfer

LOGITS = "logits"
PRETRAINED = "PreTrainedModel"
KNOWN = ("colwise", "rowwise", "embedding_rowwise", "colwise_gather_output", "replicated_with_grad_allreduce")
TRIED = 8
"""Tokens on which a chain is compared with the model."""


def has_plans(model: nn.Module) -> bool:
    """Whether it is one of transformers'."""
    return any(one.__name__ == PRETRAINED for one in type(model).__mro__)


def planned_chain(model: nn.Module) -> Chain:
    """The embedding, each layer, the last norm with the head. UserError for a model whose plan has other parts."""
    asked: Any = model
    plan, body = getattr(model, "_pp_plan", None) or {}, asked.base_model_prefix
    ends = [f"{body}.embed_tokens", f"{body}.layers", f"{body}.norm", "lm_head"]
    if sorted(plan) != sorted(ends):
        raise _refused(model, "layout.pipe", f"its plan for pipelines names {', '.join(sorted(plan)) or 'nothing'}")
    if asked.config._attn_implementation != "sdpa" or set(getattr(asked.config, "layer_types", None) or ()) - {"full_attention"}:
        raise _refused(model, "layout.pipe", "attention is other than 'sdpa' over all tokens")
    rotary, head = model.get_submodule(f"{body}.rotary_emb"), model.get_submodule("lm_head")
    tied = head.weight is model.get_submodule(ends[0]).weight

    def enter(owner: nn.Module, tokens_BL: Tensor, shared: Shared) -> Tensor:
        x: Tensor = owner.get_submodule(ends[0])(tokens_BL)
        return x

    def layer(name: str) -> Callable[[nn.Module, Tensor, Shared], Tensor]:
        def run(owner: nn.Module, x_BLM: Tensor, shared: Shared) -> Tensor:
            if "planned" not in shared:
                position = torch.arange(x_BLM.shape[1], device=x_BLM.device)[None]
                shared["planned"] = {"position_ids": position, "position_embeddings": rotary(x_BLM, position)}
            x: Tensor = owner.get_submodule(name)(x_BLM, attention_mask=None, use_cache=False, **shared["planned"])
            return x

        return run

    def leave(owner: nn.Module, x_BLM: Tensor, shared: Shared) -> Tensor:
        logits: Tensor = head(owner.get_submodule(ends[2])(x_BLM))
        return logits

    layers: Any = model.get_submodule(ends[1])
    names = [f"{ends[1]}.{number}" for number in range(len(layers))]
    return (
        Unit((ends[0],), enter),
        *(Unit((name,), layer(name)) for name in names),
        Unit((ends[2], ends[0] if tied else "lm_head"), leave),
    )


@torch.no_grad()
def check(model: nn.Module, example: Tensor, *, splits: bool) -> None:
    """UserError unless its chain gives the model's logits and, where it `splits`, its plan for tensor ranks is known here. Before
    anything was applied; local."""
    if splits:
        _styles(model)
    chain = planned_chain(model)
    x = few = example[:1, :TRIED]
    shared: Shared = {}
    for unit in chain:
        x = unit.run(model, x, shared)
    asked: Any = model
    if not torch.allclose(x, asked(few, use_cache=False).logits):
        raise _refused(model, "a cut into units", "its forward pass does more than the modules of its plan one after the other")


def _styles(model: nn.Module) -> dict[str, str]:
    """By name of the module."""
    plan: dict[str, str] = getattr(model, "_tp_plan", None) or {}
    if not has_plans(model) or not plan:
        raise _refused(model, "layout.tensor", "it has no plan for it")
    styles = {name: plan[key] for name, _ in model.named_modules() if (key := re.sub(r"\.\d+(?=\.|$)", ".*", name)) in plan}
    if unknown := sorted(set(styles.values()) - set(KNOWN)):
        raise _refused(model, "layout.tensor", f"its plan splits modules as {unknown[0]!r}")
    return styles


@dataclass
class Planned(Sums):
    """Sums over the tensor ranks of a model with plans. noted: label and messages of those that fake tensors would have sent;
    own_loss: logits are gathered; alike: names of parameters whose gradients are added up."""

    noted: list[tuple[str, list[Transfer]]] = field(default_factory=list)
    own_loss: bool = False
    alike: list[str] = field(default_factory=list)
    _before: tuple[Any, Any] = (None, None)

    def of_activations(self, x: Tensor) -> Tensor:
        self._note(x, ACTIVATIONS)
        return super().of_activations(x)

    def of_gradients(self, x: Tensor) -> Tensor:
        """The same y for the same x as the call before."""
        if self._before[0] is x:
            return self._before[1]
        self._note(x, GRADIENTS)
        y = super().of_gradients(x)
        self._before = (x, y) if y is not x or isinstance(x, FakeTensor) else (None, None)
        return y

    def of_parameter(self, gradient: Tensor) -> Tensor:
        """Of a parameter that each rank has whole, over its own heads."""
        total = gradient.contiguous().clone()
        with self.waits.wait():
            all_reduce(total, self.group, self.ledger, self.waits.label(GRADIENTS)).wait()
        return total

    def _note(self, x: Tensor, label: str) -> None:
        if isinstance(x, FakeTensor):
            self.noted.append((label, sum_transfers((x.numel(), x.dtype), self.codec, "tensor", self.group.size(), label)))


def apply(
    model: nn.Module,
    group: dist.ProcessGroup,
    ledger: Ledger,
    codec: Codec | None = None,
    waits: Waits = Waits(),  # noqa: B008 (notes nothing)
    *,
    own_loss: bool = False,
) -> tuple[dict[str, Part], Planned]:
    """As `tensor.apply`, by the model's own plan. own_loss: the user's loss wants the whole logits; else `model.loss` takes this
    rank's. UserError for a model without a plan, for one with a style that is not known here, and for what cannot be halved."""
    styles, degree, rank = _styles(model), group.size(), group.rank()
    _check_degree(model, styles, degree)
    ledger.axes[group.group_name] = "tensor"
    sums, parts, made = Planned(group, ledger, codec, waits, own_loss=own_loss), dict[str, Part](), dict[int, nn.Parameter]()
    whole_head: Any = model.get_submodule("lm_head")
    vocabulary: int = whole_head.weight.shape[0]
    for name, style in styles.items():
        module: Any = model.get_submodule(name)
        if style == "replicated_with_grad_allreduce":
            for own, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.register_hook(sums.of_parameter)
                    sums.alike.append(f"{name}.{own}")
            continue
        weight = module.weight
        part = _part_of(style, weight.shape, degree, rank)
        if id(weight) in made:
            module.weight = made[id(weight)]
        else:
            keep(module, part)
            made[id(weight)] = module.weight
            parts[f"{name}.weight"] = part
        if style == "embedding_rowwise":
            parent, _, last = name.rpartition(".")
            words = words_of(part.whole, degree, rank)
            setattr(model.get_submodule(parent), last, SplitEmbedding(module, words, part.whole, sums))
        elif style == "rowwise":
            module.forward = partial(_rowwise, module, sums)
        else:
            if module.bias is not None:
                parts[f"{name}.bias"] = part
                local = module.bias.detach()[part.ranges[0].start : part.ranges[0].stop]
                module.bias = nn.Parameter(F.pad(local, (0, part.padding)).clone(), requires_grad=module.bias.requires_grad)
            module.register_forward_pre_hook(lambda _, arguments: (sums.of_gradients(arguments[0]),))
            if style == "colwise_gather_output" and own_loss:
                module.register_forward_hook(partial(_whole_logits, sums, part.whole))
    if "colwise_gather_output" in styles.values() and not own_loss:
        asked: Any = model
        asked.loss = tensor_cross_entropy(group, ledger, vocabulary, waits)
    return parts, sums


def traffic_by_unit(
    model: nn.Module, chain: Chain, sums: Planned, example: Tensor, recomputed: Collection[str] = ()
) -> list[list[Transfer]]:
    """What a micro-batch like `example` sends over the tensor axis, for each unit. recomputed: names of layers that are computed
    again in full: all their sums forward travel again, but for the last. After `apply`, of the whole model; local."""
    found: list[list[Transfer]] = []

    def noting(unit: Unit) -> Unit:
        def run(owner: nn.Module, x: Tensor, shared: Shared) -> Tensor:
            sums.noted = []
            y = unit.run(owner, x, shared)
            forward = [sent for label, sent in sums.noted if label == ACTIVATIONS]
            again = forward[:-1] if set(recomputed) & set(unit.modules) else []
            found.append([one for sent in (*(sent for _, sent in sums.noted), *again) for one in sent])
            return y

        return replace(unit, run=run)

    boundaries(model, tuple(noting(unit) for unit in chain), example)
    for unit, sent in zip(chain, found, strict=True):
        for name in sums.alike:
            if name.startswith(tuple(f"{one}." for one in unit.modules)):
                gradient = model.get_parameter(name)
                sent.append(_sum(GRADIENTS, gradient.nbytes, gradient.itemsize))
    head: Any = model.get_submodule("lm_head")
    item = torch.promote_types(head.weight.dtype, torch.float32).itemsize
    if sums.own_loss:
        size = example.numel() * head.weight.shape[0] * head.weight.itemsize
        found[-1].append(replace(_sum(LOGITS, size, head.weight.itemsize), op="all_gather"))
    else:
        found[-1] += [_sum(LOSS, values * example.numel() * item, item) for values in (1, 2)]
    return [[replace(one, in_passes=True) for one in sent] for sent in found]


def _sum(label: str, message_bytes: int, item_bytes: int) -> Transfer:
    return Transfer(label=label, axis="tensor", op="all_reduce", message_bytes=message_bytes, item_bytes=item_bytes)


def _rowwise(module: Any, sums: Planned, x: Tensor) -> Tensor:
    y = sums.of_activations(F.linear(x, module.weight))
    return y if module.bias is None else y + module.bias


def _whole_logits(sums: Planned, vocabulary: int, module: nn.Module, _: Any, logits_BLV: Tensor) -> Tensor:
    if isinstance(logits_BLV, FakeTensor):
        return logits_BLV.new_empty((*logits_BLV.shape[:-1], vocabulary))
    trains = torch.is_grad_enabled()
    label, waits = (sums.waits.label(LOGITS), sums.waits) if trains else (EVALUATION, Waits())
    whole: Tensor = Gather.apply(logits_BLV, vocabulary, sums.group, sums.ledger, label, waits)
    return whole


def _part_of(style: str, shape: torch.Size, degree: int, rank: int) -> Part:
    dim = 1 if style == "rowwise" else 0
    if style in ("embedding_rowwise", "colwise_gather_output"):
        words = words_of(shape[0], degree, rank)
        return Part(0, (words,), shape[0], -(-shape[0] // degree) - len(words))
    each = shape[dim] // degree
    return Part(dim, (range(rank * each, (rank + 1) * each),), shape[dim])


def _check_degree(model: nn.Module, styles: dict[str, str], degree: int) -> None:
    config: Any = model.config
    counts = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }
    for name, style in styles.items():
        module: Any = model.get_submodule(name)
        if style in ("colwise", "rowwise", "colwise_gather_output") and not isinstance(module, nn.Linear):
            raise _refused(model, "layout.tensor", f"{name} is a {type(module).__name__}, no nn.Linear")
        if style in ("colwise", "rowwise"):
            counts[name] = module.out_features if style == "colwise" else module.in_features
    for name, count in counts.items():
        if count % degree:
            raise UserError(
                f"layout.tensor = {degree}: ranks get equal parts of {name} = {count}; the nearest degree that divides all is "
                f"{gcd(*counts.values(), degree)}"
            )


def _refused(model: nn.Module, what: str, why: str) -> UserError:
    return UserError(f"{what}: a {type(model).__name__} is not taken: {why}; train it with layout.data or layout.shard")
