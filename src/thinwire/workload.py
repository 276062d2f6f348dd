"""What a model costs a machine, from its shape alone: parameters, floating-point operations, bytes. No torch.

With N_m the parameters that enter a matrix product (a tied embedding counts, an embedding that is only looked up does not),
L layers, h width, s sequence length, per token:

    forward = 2 N_m + 4 L h s        backward = 2 * forward        together 6 N_m + 12 L h s

the form of Kaplan et al. 2020 and Chowdhery et al. 2022 (PaLM, appendix B). Attention counts as if it were not causal;
kernels that skip the masked half do about half of `4 L h s`, and a flash kernel's backward recomputes `2 L h s`. Of experts all
slots are computed: their matrices count by slots a token (`models.experts`).

The backward pass visits the operations in reverse, so when the gradient of a parameter is ready, what remains is the
backward of everything that ran before the parameter's first use: twice `Parameter.forward_flops_before`, and what of that is
computed again (`recomputing`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from thinwire.config.model import ModelConfig
from thinwire.config.optimizer import EIGHT_BIT
from thinwire.errors import UserError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
OPTIMIZER_VALUES_PER_PARAMETER = {"adamw": 2, "sgd": 1, "muon": 1, "signsgd": 0}
STATE_BLOCK, LEAST_CODED_STATE = 256, 4096
"""Of AdamW whose moments are kept in 8 bits: values of a block, and of the smallest parameter whose moments are."""
BACKWARD_OVER_FORWARD = 2.0
OF_EXPERTS = ("mlp.router.", "mlp.experts.")
AGAIN = {"selective": ("attention.qkv.", "mlp.up.", *OF_EXPERTS), "full": ("attention.", "mlp.up.", *OF_EXPERTS)}
"""Products of a block that its backward pass computes again (`parallel.recompute`); with qkv goes attention itself."""


EXPERTS = ".mlp.experts."
"""In the names of experts' parameters, before the number of each."""


def is_of_expert(parameter: str) -> bool:
    """By its name in the model, whether it is one of an expert."""
    return EXPERTS in parameter


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile puts in between, so that compiled or not it is the same parameter."""
    return name.replace("_orig_mod.", "")


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model. `forward_flops_before`: per token, all that runs before its first use; recomputed_flops_before: of
    that, what the backward pass has still to compute again when this gradient is ready.

    dtype: of its gradient as a bucket holds it: of a complex parameter that of its real numbers.
    """

    name: str
    shape: tuple[int, ...]
    forward_flops_before: float = 0.0
    dtype: str = "float32"
    recomputed_flops_before: float = 0.0

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def stored_bytes(self) -> int:
        """Of its gradient."""
        return ITEM_BYTES[self.dtype] * self.numel

    @property
    def wide_dtype(self) -> str:
        """In which what is kept of it, such as an anchor, is: float64 of float64, else float32."""
        return "float64" if self.dtype == "float64" else "float32"


@dataclass(frozen=True)
class Workload:
    """One micro-batch of a model on one rank. Parameters stand in the order of `model.parameters()`.

    block_names: of the equal repeated blocks. recomputed_flops_per_token: what the backward pass computes again.
    """

    parameters: tuple[Parameter, ...]
    forward_flops_per_token: float
    tokens_per_microbatch: int
    block_names: tuple[str, ...] = ()
    recomputed_flops_per_token: float = 0.0

    @classmethod
    @lru_cache(maxsize=256)
    def of_transformer(cls, config: ModelConfig, micro_batch: int, sequence: int) -> Workload:
        """`micro_batch` sequences of `sequence` tokens. UserError if they are longer than the model's context."""
        if sequence > config.context:
            raise UserError(
                f"a sequence of {sequence} tokens is longer than the model's context of {config.context}; "
                "shorten the sequence or enlarge model.context"
            )
        width, blocks = config.width, tuple(f"blocks.{i}" for i in range(config.layers))
        attention_flops = 4.0 * width * sequence
        rest: list[tuple[str, tuple[int, ...], float]] = [
            ("attention_norm.weight", (width,), 0.0),
            ("attention.qkv.weight", (config.qkv_width, width), attention_flops),
            ("attention.out.weight", (width, width), 0.0),
            ("mlp_norm.weight", (width,), 0.0),
        ]
        inner = [(name, shape, _product_flops(shape) + extra) for name, shape, extra in rest]
        mlp: list[tuple[str, tuple[int, ...]]] = [
            ("up.weight", (config.up_width, width)),
            ("down.weight", (width, config.hidden)),
        ]
        if config.experts:
            router, per_token = (config.experts, width), config.expert_slots(sequence) / sequence
            inner.append(("mlp.router.weight", router, _product_flops(router)))
            for expert in range(config.experts):
                inner += [(f"mlp.experts.{expert}.{name}", shape, _product_flops(shape) * per_token) for name, shape in mlp]
        else:
            inner += [(f"mlp.{name}", shape, _product_flops(shape)) for name, shape in mlp]
        dtype = config.dtype
        parameters = [Parameter("embed.weight", (config.vocabulary, width), dtype=dtype)]
        if config.positions == "learned":
            parameters.append(Parameter("positions.weight", (config.context, width), dtype=dtype))
        done = 0.0
        for block in blocks:
            for name, shape, flops in inner:
                parameters.append(Parameter(f"{block}.{name}", shape, done, dtype))
                done += flops
        parameters.append(Parameter("norm.weight", (width,), done, dtype))
        if not config.tied:
            parameters.append(Parameter("head.weight", (config.vocabulary, width), done, dtype))
        return cls(
            parameters=tuple(parameters),
            forward_flops_per_token=done + _product_flops((config.vocabulary, width)),
            tokens_per_microbatch=micro_batch * sequence,
            block_names=blocks,
        )

    @classmethod
    def of_parameters(
        cls,
        parameters: Iterable[tuple[str, tuple[int, ...]]],
        tokens_per_microbatch: int,
        flops_per_token: float | None = None,
    ) -> Workload:
        """Any model: (name, shape) in the order of registration; `flops_per_token` forward and backward, or 6 a parameter.

        The operations are spread over the parameters by their size. A token is whatever the batch counts.
        """
        listed = [Parameter(name, tuple(shape)) for name, shape in parameters]
        if not listed:
            raise UserError("a workload needs at least one parameter, but the list is empty")
        ends = list(accumulate(parameter.numel for parameter in listed))
        total = 6.0 * ends[-1] if flops_per_token is None else flops_per_token
        forward = total / (1.0 + BACKWARD_OVER_FORWARD)
        placed = tuple(
            replace(parameter, forward_flops_before=forward * (end - parameter.numel) / max(1, ends[-1]))
            for parameter, end in zip(listed, ends, strict=True)
        )
        return cls(placed, forward, tokens_per_microbatch)

    @cached_property
    def num_parameters(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def backward_flops_per_token(self) -> float:
        return BACKWARD_OVER_FORWARD * self.forward_flops_per_token + self.recomputed_flops_per_token

    @property
    def flops_per_token(self) -> float:
        return self.forward_flops_per_token + self.backward_flops_per_token

    @property
    def flops_per_microbatch(self) -> float:
        return self.flops_per_token * self.tokens_per_microbatch

    @cached_property
    def block_flops_per_token(self) -> tuple[float, ...]:
        """Forward, of each block, up to the next one or to what first computes behind the last."""
        inside = [[one for one in self.parameters if one.name.startswith(f"{block}.")] for block in self.block_names]
        begins = [min(one.forward_flops_before for one in its) for its in inside]
        names = {one.name for its in inside for one in its}
        behind = [one.forward_flops_before for one in self.parameters if one.name not in names]
        ends = [*begins[1:], min((one for one in behind if one > max(begins, default=0.0)), default=self.forward_flops_per_token)]
        return tuple(end - begin for begin, end in zip(begins, ends, strict=False))

    @cached_property
    def chain_flops_per_token(self) -> tuple[float, ...]:
        """Forward, of each unit between which a transformer may be cut: embeddings, each block, the last norm with the head."""
        begins = [*(one.forward_flops_before for one in self._begins), self.forward_flops_per_token]
        return (0.0, *(end - begin for begin, end in pairwise(begins)))

    @cached_property
    def chain_recomputed_per_token(self) -> tuple[float, ...]:
        """What the backward pass computes again, of the same units."""
        begins = [*(one.recomputed_flops_before for one in self._begins), self.recomputed_flops_per_token]
        return (0.0, *(end - begin for begin, end in pairwise(begins)))

    @property
    def _begins(self) -> list[Parameter]:
        """The first of each unit behind the embeddings."""
        first = [next(one for one in self.parameters if one.name.startswith(f"{block}.")) for block in self.block_names]
        return [*first, self.parameter("norm.weight")]

    def recomputing(self, kinds: Mapping[str, str]) -> Workload:
        """The same, where blocks are computed again in the backward pass: "selective" or "full", by name.

        A block is computed again in one piece when it is full, attention and MLP apart when it is selective.
        """
        if not kinds and not self.recomputed_flops_per_token:
            return self
        ends = [*(one.forward_flops_before for one in self.parameters[1:]), self.forward_flops_per_token]
        so_far, total, piece, placed = 0.0, 0.0, "", []
        for one, end in zip(self.parameters, ends, strict=True):
            block, inner = ".".join(one.name.split(".")[:2]), ".".join(one.name.split(".")[2:])
            kind = kinds.get(block, "")
            if piece != (piece := block if kind == "full" else f"{block}.{inner.partition('.')[0]}"):
                so_far = total
            placed.append(replace(one, recomputed_flops_before=so_far))
            if kind and inner.startswith(AGAIN[kind]):
                total += end - one.forward_flops_before
        return replace(self, parameters=tuple(placed), recomputed_flops_per_token=total)

    def part(self, names: Collection[str], forward_flops_per_token: float) -> Workload:
        """Of a rank that has these parameters of the model, and computes so much of a forward pass."""
        kept = [one for one in self.parameters if one.name in names]
        blocks = tuple(block for block in self.block_names if any(one.name.startswith(f"{block}.") for one in kept))
        inside = [one.forward_flops_before for one in kept if one.name.startswith(tuple(f"{block}." for block in blocks))]
        begin = min(inside, default=0.0)
        return replace(
            self,
            parameters=tuple(replace(one, forward_flops_before=max(0.0, one.forward_flops_before - begin)) for one in kept),
            forward_flops_per_token=forward_flops_per_token,
            block_names=blocks,
        )

    def of_expert_rank(self, experts: int, degree: int, rank: int) -> Workload:
        """Of rank `rank` of `degree`, with its share of a block's experts, each of which has the slots of so many more tokens."""
        each = experts // degree

        def place(name: str) -> str | None:
            """The parameter up to which a rank has computed as much. None: another rank has this one."""
            before, found, number = name.partition(EXPERTS)
            if not found:
                return name
            expert, dot, rest = number.partition(".")
            return f"{before}{found}{int(expert) % each * degree}{dot}{rest}" if int(expert) // each == rank else None

        before = {one.name: one.forward_flops_before for one in self.parameters}
        kept = [(one, at) for one in self.parameters if (at := place(one.name))]
        return replace(self, parameters=tuple(replace(one, forward_flops_before=before[at]) for one, at in kept))

    def parameter(self, name: str) -> Parameter:
        """UserError if the model has no such parameter."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise UserError(f"the model has no parameter {name!r}; the first is {self.parameters[0].name!r}")

    def backward_flops_remaining(self, name: str) -> float:
        """Per token: what the backward pass still has to do when this parameter's gradient is ready."""
        parameter = self.parameter(name)
        return BACKWARD_OVER_FORWARD * parameter.forward_flops_before + parameter.recomputed_flops_before

    @cached_property
    def stored_bytes(self) -> int:
        """Of the parameters in their dtypes, and of their gradients."""
        return sum(parameter.stored_bytes for parameter in self.parameters)

    def optimizer_bytes(self, optimizer: str = "adamw") -> int:
        """State beside parameters and gradients, of their dtypes: two moments for adamw, one momentum for sgd and muon, none for
        signsgd. "adamw 8bit": two bytes a value and two scales a block, but of parameters that are too small for it."""
        if optimizer != EIGHT_BIT:
            return self.stored_bytes * OPTIMIZER_VALUES_PER_PARAMETER[optimizer]
        return sum(
            2 * (one.numel + -(-one.numel // STATE_BLOCK) * ITEM_BYTES[one.dtype])
            if one.numel >= LEAST_CODED_STATE
            else 2 * one.stored_bytes
            for one in self.parameters
        )


def by_wide_dtype(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Those that have values, in their wide dtype: a list of float32, then one of float64; none that is empty."""
    wide = [replace(parameter, dtype=parameter.wide_dtype) for parameter in parameters if parameter.numel]
    lists = ([parameter for parameter in wide if parameter.dtype == dtype] for dtype in ("float32", "float64"))
    return [found for found in lists if found]


def _product_flops(shape: tuple[int, ...]) -> float:
    """Of a matrix product per token: two an element; vectors (norms) count nothing."""
    return 2.0 * math.prod(shape) if len(shape) == 2 else 0.0
