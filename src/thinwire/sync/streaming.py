"""Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512): DiLoCo by fragments, one at a time, while training goes on.

    fragment p is sent at step t if (t - t_p) mod H = 0, and applied at t + tau:
    x^p <- Nesterov(x^p, mean_m D^p_m),   x^p_m <- alpha x^p_m + (1 - alpha) x^p

Fragments are strides of whole layers (`fragments`), so the peak of what is sent is a fraction of the model, and the exchange
hides under tau steps. Outer learning rate 0.4, alpha 0.5; tau up to 5 costs little. Outer gradients in 4 bits cost nothing
([compress] kind = "fp4" or "int4", with feedback).
"""

from thinwire.config.sync import Streaming
from thinwire.sync.local_steps import Schedule
from thinwire.sync.outer import Nesterov

LEARNING_RATE, MIXING = 0.4, 0.5
"""As published."""


def streaming(config: Streaming, replicas: int) -> tuple[Schedule, Nesterov]:
    """When, and by which outer step."""
    schedule = Schedule(
        every=config.every,
        layers_per_fragment=config.layers_per_fragment,
        overlap=config.overlap,
        mixing=(MIXING if config.mixing is None else config.mixing) if config.overlap else 0.0,
    )
    return schedule, Nesterov(config.outer_learning_rate or LEARNING_RATE, config.outer_momentum)
