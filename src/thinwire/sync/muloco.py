"""MuLoCo (Therien et al. 2025, arXiv 2505.23725): DiLoCo whose inner optimizer is Muon (`train.optimizer.kind = "muon"`).

The pseudo-gradients of Muon are better conditioned than AdamW's, so that 4 bits lose nothing and the outer momentum may be
smaller: eta = 0.7, mu = 0.6, H = 30. Embeddings and vectors are trained by AdamW within the replica.
"""

from thinwire.config.sync import MuLoCo
from thinwire.sync.local_steps import Schedule
from thinwire.sync.outer import Nesterov, published_learning_rate


def muloco(config: MuLoCo, replicas: int) -> tuple[Schedule, Nesterov]:
    """When, and by which outer step."""
    rate = config.outer_learning_rate or published_learning_rate(replicas)
    return Schedule(every=config.every), Nesterov(rate, config.outer_momentum)
