"""[pipeline] of run.toml: the schedule of layout.pipe, and what crosses between its stages."""

from typing import Literal

from pydantic import Field, model_validator

from thinwire.tomlfile import Section

Boundary = Literal["none", "bf16", "fp16", "int8", "int4", "fp4"]
STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb1p": 1, "zbv": 2, "dualpipev": 2}
"""By schedule, where not given; the last two have exactly so many."""

APART = ("zb1p", "zbv", "dualpipev")
"""Schedules whose backward passes compute gradients of inputs and of weights apart."""


class PipelineSection(Section):
    """Used where layout.pipe is above 1. Micro-batches of a step are sync.accumulate."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev"] = "1f1b"
    """gpipe: Huang et al. 2019; 1f1b: Narayanan et al. 2019; interleaved: Narayanan et al. 2021; zb1p and zbv: Qi et al. 2024;
    dualpipev: DeepSeek-AI 2025. All but gpipe keep as few activations as the stages behind need."""
    stages_per_rank: int = Field(0, ge=0)
    """0: 1, or 2 for interleaved, zbv and dualpipev."""
    activations: Boundary = "none"
    """The code in which activations are sent to the next stage."""
    gradients: Boundary = "none"
    """The code in which their gradients are sent back."""
    copies: Literal["none", "bf16", "fp16"] = "none"
    """Both ends of a boundary keep what each sample's activation was last, in these floats, and `activations` codes the change
    since then; what comes for the first time is sent in them. For samples that return: data.windows."""

    @model_validator(mode="after")
    def _check(self) -> "PipelineSection":
        usual, given = STAGES_PER_RANK[self.schedule], self.stages_per_rank
        if given and given != usual and self.schedule in ("zbv", "dualpipev", "gpipe", "1f1b"):
            raise ValueError(f"stages_per_rank = {given}: {self.schedule} has {usual}; leave it out, or take 'interleaved'")
        if self.copies != "none" and self.activations == "none":
            raise ValueError(f"copies = {self.copies!r} is for changes that are sent in codes; give pipeline.activations, 'int4'")
        return self

    @property
    def first(self) -> str:
        """The code of activations of which there is no copy."""
        return self.activations if self.copies == "none" else self.copies

    @property
    def per_rank(self) -> int:
        """Stages on each rank."""
        return self.stages_per_rank or STAGES_PER_RANK[self.schedule]
