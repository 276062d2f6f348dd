"""Local SGD: replicas average their parameters every H steps (Stich 2018; Lin et al. 2018, post-local SGD).

    x <- mean_m x_m = x - mean_m (x - x_m)

which is an outer step of length 1 without momentum. Hierarchical: ranks that are near each other (the data axis) average more
often than those that are far apart (the outer axis), each in the same way.
"""

from thinwire.config.sync import LocalSGD
from thinwire.sync.local_steps import Schedule
from thinwire.sync.outer import Nesterov

AVERAGE = Nesterov(1.0, 0.0)


def local_sgd(config: LocalSGD, replicas: int) -> tuple[Schedule, Nesterov]:
    """When, and by which outer step."""
    return Schedule(every=config.every), AVERAGE
