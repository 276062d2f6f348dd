"""[sharded] of run.toml: how the ranks of layout.shard share the states of one replica, and what travels between them."""

from typing import Literal

from thinwire.tomlfile import Section


class ShardedSection(Section):
    """Used where layout.shard is above 1."""

    reshard: Literal["always", "never"] = "always"
    """When gathered weights are given up: "always": behind each block's forward pass, so that the backward pass gathers them
    again (ZeRO-3, Rajbhandari et al. 2020); "never": behind the step's last backward pass, so that they are gathered once a step
    (as ZeRO-2 does)."""
    weights: Literal["none", "bf16", "fp16", "int8", "int4"] = "none"
    """The code in which weights are gathered, in training and in evaluations."""
    gradients: Literal["none", "bf16", "fp16", "int8", "int4", "fp4", "sign"] = "none"
    """The code in which gradients are reduced and scattered, with error feedback."""
