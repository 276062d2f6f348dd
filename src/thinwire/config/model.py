"""The shape of a decoder-only transformer, and named presets.

Parameters (no biases; h width, F hidden, V vocabulary, g = kv_heads / heads, m = 2 matrices for gelu, 3 for swiglu):

    N = V h (once when tied, else twice) + context h (learned positions) + layers * (h^2 (2 + 2 g) + m h F + 2 h) + h

and with E experts, of which k compute a token, E m h F + E h in place of m h F; of these k m h F + E h are active for a token.

Sources of the presets: GPT-2 (Radford et al. 2019), GPT-3 (Brown et al. 2020, table 2.1), Llama 2 and 3 (Touvron et al. 2023,
Grattafiori et al. 2024, table 3), Megatron-Turing 530B (Smith et al. 2022), Megatron 1T (Narayanan et al. 2021, table 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, Literal

from pydantic import Field, model_validator

from thinwire.errors import UserError
from thinwire.tomlfile import Section, validate


class ModelConfig(Section):
    """A decoder-only transformer. Zero for `kv_heads` or `hidden` asks for the usual value, which is then filled in."""

    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(default=0, ge=0)
    """Heads of keys and values (grouped-query attention); 0: as many as `heads`."""
    hidden: int = Field(default=0, ge=0)
    """Width inside the MLP; 0: 4 * width (gelu), or 8/3 * width rounded up to a multiple of 64 (swiglu)."""
    vocabulary: int = Field(default=256, ge=1)
    context: int = Field(default=1024, ge=1)
    """Longest sequence in tokens."""
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_base: float = Field(default=10_000.0, gt=1.0)
    norm: Literal["layer", "rms"] = "rms"
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    tied: bool = True
    """The output projection is the token embedding."""
    experts: int = Field(default=0, ge=0)
    """MLPs of each block, of which a router chooses some for each token; 0: one for all tokens."""
    experts_per_token: int = Field(default=2, ge=1)
    capacity: float = Field(default=1.25, ge=0.0)
    """Slots of an expert, as a multiple of what evenly spread tokens would take; choices beyond them are dropped. 0: none is, and
    all experts compute as many slots as there are tokens."""
    balance: float = Field(default=0.01, ge=0.0)
    """Weight of the loss that spreads tokens evenly over the experts. It is in the gradient only: losses are the text's."""
    init_std: float = Field(default=0.02, gt=0.0)
    """Deviation of the first weights. The 0.02 of GPT-2 and Llama suits widths near a thousand; narrow models learn sooner
    with about 0.7 / sqrt(width)."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of weights, gradients and the optimizer's state. In 16 bits small updates are rounded off, since nobody holds the weights
    in float32; for speed alone rather set train.dtype."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        if not filled.get("kv_heads") and "heads" in filled:
            filled["kv_heads"] = filled["heads"]
        width = filled.get("width")
        if not filled.get("hidden") and isinstance(width, int):
            swiglu = filled.get("mlp", "swiglu") == "swiglu"
            filled["hidden"] = -(-8 * width // (3 * 64)) * 64 if swiglu else 4 * width
        return filled

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions want an even head: width {self.width} / heads {self.heads} = {self.head_width}")
        if self.experts and self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} is more than the {self.experts} experts")
        return self

    def expert_slots(self, sequence: int) -> int:
        """Of one expert, for the tokens of one sequence."""
        if not self.capacity:
            return sequence
        return min(sequence, ceil(self.capacity * self.experts_per_token * sequence / self.experts))

    @property
    def idle_parameters(self) -> int:
        """Those of the experts that were not chosen for a token."""
        idle = max(0, self.experts - self.experts_per_token)
        return self.layers * idle * (self.up_width + self.hidden) * self.width

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def qkv_width(self) -> int:
        """Outputs of the fused projection to queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_width

    @property
    def up_width(self) -> int:
        """Outputs of the first MLP projection: gate and up side by side for swiglu."""
        return self.hidden * (2 if self.mlp == "swiglu" else 1)

    def check_experts(self, degree: int) -> None:
        """UserError unless each of `degree` ranks can have equally many experts."""
        if self.experts == 0 or self.experts % degree:
            divisors = (one for one in range(1, self.experts + 1) if self.experts % one == 0)
            nearest = min(divisors, key=lambda one: abs(one - degree), default=1)
            raise UserError(
                f"layout.expert = {degree}: model.experts = {self.experts} cannot be shared out evenly; the nearest degree that "
                f"can be taken is {nearest}"
            )

    def check_tensor(self, degree: int) -> None:
        """UserError unless each of `degree` ranks gets a head of keys and values, with its queries, and hidden values."""
        if self.experts and degree > 1:
            raise UserError(
                f"layout.tensor = {degree} with model.experts = {self.experts}: matrices of experts are not split; set it to 1"
            )
        for field, of_these in (
            ("kv_heads", "head of keys and values, with its queries,"),
            ("hidden", "value of the MLP's"),
        ):
            if degree > (most := getattr(self, field)):
                raise UserError(
                    f"layout.tensor = {degree}: each rank takes one {of_these} at least, and model.{field} = {most}; "
                    f"take layout.tensor = {min(self.kv_heads, self.hidden)} or less"
                )


_GPT2 = {"positions": "learned", "norm": "layer", "mlp": "gelu", "tied": True}
_LLAMA3 = {"vocabulary": 128_256, "context": 8192, "rotary_base": 500_000.0}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "1m": {"layers": 4, "width": 128, "heads": 4, "hidden": 448, "context": 256, "init_std": 0.06},
    "3m": {"layers": 7, "width": 192, "heads": 6, "context": 256, "init_std": 0.05},
    "10m": {"layers": 8, "width": 320, "heads": 5, "context": 512, "init_std": 0.04},
    "30m": {"layers": 9, "width": 512, "heads": 8, "context": 1024, "init_std": 0.03},
    "124m": {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50_257, "context": 1024, **_GPT2},
    "350m": {"layers": 24, "width": 1024, "heads": 16, "vocabulary": 50_257, "context": 1024, **_GPT2},
    "1b": {"layers": 20, "width": 2048, "heads": 16, "kv_heads": 4, "hidden": 5632, "vocabulary": 32_000, "context": 4096},
    "3b": {"layers": 28, "width": 3072, "heads": 24, "kv_heads": 8, "hidden": 8192, **_LLAMA3},
    "7b": {"layers": 32, "width": 4096, "heads": 32, "hidden": 11_008, "vocabulary": 32_000, "context": 4096, "tied": False},
    "8b": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "hidden": 14_336, **_LLAMA3, "tied": False},
    "13b": {"layers": 40, "width": 5120, "heads": 40, "hidden": 13_824, "vocabulary": 32_000, "context": 4096, "tied": False},
    "70b": {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "hidden": 28_672, **_LLAMA3, "tied": False},
    "175b": {"layers": 96, "width": 12_288, "heads": 96, "vocabulary": 50_257, "context": 2048, **_GPT2},
    "405b": {"layers": 126, "width": 16_384, "heads": 128, "kv_heads": 8, "hidden": 53_248, **_LLAMA3, "tied": False},
    "530b": {"layers": 105, "width": 20_480, "heads": 128, "vocabulary": 50_257, "context": 2048, **_GPT2},
    "1t": {"layers": 128, "width": 25_600, "heads": 160, "vocabulary": 51_200, "context": 2048, **_GPT2},
}
"""Fields of each preset, before the usual values are filled in, so that `preset` can change the width alone."""


def preset(name: str, changes: Mapping[str, Any] | None = None) -> ModelConfig:
    """The named shape, with single fields replaced by `changes`. UserError for an unknown name or a shape that cannot be."""
    if name not in PRESETS:
        raise UserError(f"model preset {name!r} does not exist; there are {', '.join(PRESETS)}")
    return validate(ModelConfig, {**PRESETS[name], **(changes or {})}, f"model preset {name!r} with changes")
