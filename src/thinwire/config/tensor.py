"""[tensor] of run.toml: what travels between the ranks of layout.tensor."""

from thinwire.config.pipeline import Boundary
from thinwire.tomlfile import Section


class TensorSection(Section):
    """Used where layout.tensor is above 1."""

    sums: Boundary = "none"
    """The code of the activations and of their gradients that are added up over the ranks of a layer, in training."""
