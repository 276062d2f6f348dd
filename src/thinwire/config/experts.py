"""[experts] of run.toml: what travels between the ranks of layout.expert."""

from thinwire.config.pipeline import Boundary
from thinwire.tomlfile import Section


class ExpertsSection(Section):
    """Used where layout.expert is above 1."""

    slots: Boundary = "none"
    """The code of what goes into the slots of experts and comes out of them, and of the gradients, in training."""
