"""[task] of run.toml: what is learned, and from which data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from thinwire.config.data import DataSection
from thinwire.errors import UserError
from thinwire.tomlfile import Section

LANGUAGE_MODEL: Literal["generation"] = "generation"
Kind = Literal[
    "generation",
    "detection",
    "image_classification",
    "intent_slots",
    "lm_lstm",
    "qa",
    "recommendation",
    "segmentation",
    "sentiment",
    "speech",
    "summarisation",
    "translation",
]


class TaskSection(Section):
    """What is learned. All but "generation" bring a model of their own."""

    kind: Kind = LANGUAGE_MODEL
    """"generation": the next token, by the transformer of [model] on the text of [data]."""
    source: str = ""
    """Data of one's own, in the form that the task takes; empty: what it finds on the machine."""
    width: int = Field(0, ge=0)
    """Of the task's model; 0: its own."""
    layers: int = Field(0, ge=0)
    """Of the task's model; 0: its own."""

    @property
    def is_language_model(self) -> bool:
        """Whether [model] and [data] say what is trained."""
        return self.kind == LANGUAGE_MODEL

    def only_language_model(self, what: str) -> None:
        """UserError, for what takes no other task."""
        if not self.is_language_model:
            raise UserError(f"{what} takes the language model, not task.kind = {self.kind!r}; see docs/tasks.md for what does")

    def check(self, config: Any) -> None:
        """ValueError for what a run with this task does not take. config: the whole RunConfig."""
        if self.is_language_model:
            if self != TaskSection():
                raise ValueError(
                    f"task.kind = {self.kind!r} is described in [model] and [data]; leave task.source, width and layers out"
                )
            return
        for axis in ("pipe", "expert", "seq", "tensor"):
            if (degree := getattr(config.layout, axis)) > 1:
                raise ValueError(
                    f"layout.{axis} = {degree} cuts thinwire's Transformer, and task.kind = {self.kind!r} has another model; "
                    "take layout.data, layout.shard, or a sync.kind that exchanges rarely"
                )
        if config.model != type(config.model).model_validate({"dtype": config.model.dtype}):
            raise ValueError(f"[model] is the language model, and task.kind = {self.kind!r} has its own; give model.dtype alone")
        if config.data.model_copy(update={"cache": ""}) != DataSection():
            raise ValueError(f"[data] describes a language model's text; the data of task.kind = {self.kind!r} are task.source")
        if config.train.recompute != "none":
            raise ValueError(f"train.recompute = {config.train.recompute!r} is for the language model; leave it out")
