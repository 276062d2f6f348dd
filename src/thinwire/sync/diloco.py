"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105): H inner steps alone, then one outer step together.

    D = mean_m (x - x_m)   after H steps of AdamW on each replica m;   x <- Nesterov(x, D);   x_m <- x

The inner optimizer's state is never exchanged. H 30 costs little quality, H 100 to 500 suits links of 1 Gbit/s and less.
"""

from thinwire.config.sync import DiLoCo
from thinwire.sync.local_steps import Schedule
from thinwire.sync.outer import Nesterov, published_learning_rate


def diloco(config: DiLoCo, replicas: int) -> tuple[Schedule, Nesterov]:
    """When, and by which outer step."""
    rate = config.outer_learning_rate or published_learning_rate(replicas)
    return Schedule(every=config.every), Nesterov(rate, config.outer_momentum)
