"""[compress]: what gradients look like on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from math import prod
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from thinwire.tomlfile import Section, validate

SUMMABLE = frozenset({"bf16", "fp16"})
"""Kinds that cast: an all-reduce adds them up as they are sent."""

EMBEDDINGS = ("*embed*", "*positions*", "*wte*", "*wpe*")
"""Parameters that coarse codes hurt most (wte and wpe: GPT-2's). Unless the user chooses otherwise they go in int8, and between
shards uncoded."""
FINE = SUMMABLE | {"int8"}
"""Kinds that lose little."""
BLOCKED = frozenset({"int4", "fp4", "ternary", "codebook2"})
"""Coarse kinds with a scale or a codebook for each block, of which small values get little. (sign gives all of a block one size,
and so one second moment.)"""
WHOLE = frozenset({"dgc", "demo"})
"""Kinds whose memory is a momentum, of which an int8 code would send all at once: embeddings go uncoded."""

ROWS = " rows "
"""Between a parameter's name and which of its rows are meant, where a part of it goes by itself."""

NonFinite = Literal["average", "raise"]
"""What becomes of a step in which a gradient is not: an error on all ranks, or the average is not either."""

Patterns = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name is as one of the patterns say; that of some of its rows is as the parameter's."""
    return any(fnmatch(name.partition(ROWS)[0], pattern) for pattern in patterns)


class NoCompression(Section):
    """Gradients travel as they are."""

    kind: Literal["none"] = "none"


class Coded(Section):
    """Gradients travel through the codes of this kind. Options that may be None belong to single kinds, with defaults there."""

    kind: Literal[
        "bf16",
        "fp16",
        "int8",
        "int4",
        "fp4",
        "sign",
        "ternary",
        "codebook2",
        "topk",
        "topk_global",
        "randomk",
        "dgc",
        "svd",
        "powersgd",
        "demo",
    ]
    exclude: Patterns | None = None
    """Parameters that stay float32, by name, with * for anything; one pattern or several. (): all are coded by this kind. None:
    embeddings go in int8, which bf16, fp16 and int8 need not be told, and in float32 with dgc and demo."""
    vectors: bool | None = None
    """Code parameters of one dimension too. None: only bf16 and fp16 do."""
    after_steps: int = Field(0, ge=0)
    """Exchange plainly in the first steps, while gradients change fast."""
    exchange: Literal["auto", "two-shot", "gather"] = "auto"
    """How codes that cannot be summed are averaged; auto: for each parameter by whichever sends fewer bytes."""

    feedback: bool | None = None
    """What coding loses is kept and added to the next step's gradient. None: yes, but for bf16 and fp16, which cannot."""
    feedback_decay: float | None = Field(None, ge=0, le=1)
    """Of what is kept, this part is added: 1, but 0.999 for demo, whose memory is a momentum."""
    feedback_average: float | None = Field(None, gt=0, le=1)
    """Weight of the newest loss in a moving average (LoCo: 0.8); 1, which None is: all that was lost is kept."""
    feedback_reset: int | None = Field(None, ge=0)
    """Steps after which what is kept is forgotten (LoCo: 1024); 0, which None is: never."""
    feedback_removal: float | None = Field(None, gt=0, le=1)
    """Which part of what was sent is taken out of what is kept: 1, but 0.2 for demo."""
    feedback_storage: Literal["float32", "int8"] | None = None
    """int8 takes a quarter of the memory of float32, which None is, and loses a little itself."""

    precondition: bool | None = None
    """Code in units of the optimizer's second moments. None: yes for int4, fp4, ternary and codebook2, where gradients are
    averaged in each step and the optimizer is AdamW; other kinds cannot."""
    fused: bool = False
    """Compile the codec's kernels (half a minute at the start); the bits are the same."""
    rounding: Literal["nearest", "stochastic"] | None = None
    """int8, int4."""
    hadamard: bool = False
    """int4: rotate each block before it is coded, for gradients with spikes."""
    k: int | None = Field(None, ge=1)
    """topk: values sent of each 4096; demo: coefficients sent of each tile."""
    values: Literal["bf16", "int8"] | None = None
    """topk: how each value is sent."""
    fraction: float | None = Field(None, gt=0, le=1)
    """topk_global, randomk, dgc: part of the values that is sent."""
    rank: int | None = Field(None, ge=1)
    """powersgd, svd: of the matrices that are sent."""
    tile: int | None = Field(None, ge=2)
    """demo: side of the square tiles that are transformed."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """dgc: of the sum that each rank keeps, 0.9; the optimizer should have none of its own."""
    warmup_steps: int | None = Field(None, ge=1)
    """dgc: so many steps each with 25 %, 6.25 %, ... of the values sent, until `fraction` is reached; without it, at once."""

    @property
    def feeds_back(self) -> bool:
        """Whether what coding loses is kept."""
        return self.kind not in SUMMABLE if self.feedback is None else self.feedback

    @property
    def preconditions(self) -> bool:
        """Whether gradients are coded in units of the optimizer's second moments, where it has some."""
        return self.kind in BLOCKED if self.precondition is None else self.precondition

    @property
    def excluded(self) -> tuple[str, ...]:
        """Patterns of what is not coded."""
        usual = EMBEDDINGS if self.kind in WHOLE else ()
        return usual if self.exclude is None else self.exclude

    @property
    def finer(self) -> tuple[str, ...]:
        """Patterns of what goes in int8."""
        return EMBEDDINGS if self.exclude is None and self.kind not in FINE | WHOLE else ()

    @property
    def codes_vectors(self) -> bool:
        """Whether parameters of one dimension are coded."""
        return self.kind in SUMMABLE if self.vectors is None else self.vectors

    def is_coded(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a parameter, or some rows of it, may be coded."""
        if len(shape) < 2 and not self.codes_vectors:
            return False
        return prod(shape) > 0 and not matches(name, self.excluded)


class ShardedOptions(Section):
    """What `compress_sharded` takes beside the codecs; it says what each does."""

    feedback: Literal["int8", "float32", "none"] | None = None
    exclude: Patterns | None = None
    prefetch_units: int | None = Field(None, ge=0)
    nonfinite: NonFinite = "average"


def read_coding(value: str | Mapping[str, Any], where: str) -> NoCompression | Coded:
    """From a kind, or a table of options with the kind, as an argument has it. where: for the UserError."""
    table = {"kind": value} if isinstance(value, str) else dict(value)
    return validate(NoCompression, table, where) if table.get("kind") == "none" else validate(Coded, table, where)


SPARSELOCO = Coded(kind="topk", k=64, values="int8", feedback_decay=0.95, exclude=(), vectors=True)
"""What sync.kind = "sparseloco" takes where [compress] is not given, as published (Sarfi et al. 2025)."""


def _none_unless_named(value: Any) -> Any:
    return {"kind": "none", **value} if isinstance(value, dict) else value


Compress = Annotated[NoCompression | Coded, Field(discriminator="kind"), BeforeValidator(_none_unless_named)]


def without_feedback(content: Any) -> Any:
    """A section as it is read, where feedback would come too late to mend anything: codes with a scale a block have none, unless
    the section says something of it."""
    if not isinstance(content, dict) or content.get("kind") not in BLOCKED or any(key.startswith("feedback") for key in content):
        return content
    return {**content, "feedback": False}
