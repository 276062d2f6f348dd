"""SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706): sparse, coarse pseudo-gradients; error feedback in the place of momentum.

    e_m <- beta e_m + D_m,   S_m = Q(TopK(e_m)),   e_m <- e_m - S_m,   x <- x - eta mean_m S_m

with the 64 largest of each 4096 values and beta = 0.95, in the exchange (`config.compress.SPARSELOCO`, which is what is taken
where [compress] is not given), eta = 1, and H = 30. Embeddings and vectors are coded too.
"""

from thinwire.config.sync import SparseLoCo
from thinwire.sync.local_steps import Schedule
from thinwire.sync.outer import Nesterov


def sparseloco(config: SparseLoCo, replicas: int) -> tuple[Schedule, Nesterov]:
    """When, and by which outer step."""
    return Schedule(every=config.every), Nesterov(config.outer_learning_rate, 0.0)
