"""The synchroniser that [sync] asks for, by its kind.

every_step   gradients are averaged in each step (`every_step`)
noloco       replicas exchange in pairs (`noloco`)
retrace      replicas average the gradients of H steps alone, and take these steps again (`retrace`)

The others are the engine of `local_steps`, by when each sends, and by its outer step:

local_sgd    replicas average their parameters (Stich 2018; Lin et al. 2018, post-local SGD): x <- mean_m x_m, which is an outer
             step of length 1 without momentum. Hierarchical: ranks that are near each other (the data axis) average more often
             than those that are far apart (the outer axis), each in the same way.

diloco       H inner steps alone, then one outer step together (Douillard et al. 2023, arXiv 2311.08105):

                 D = mean_m (x - x_m)   after H steps of AdamW on each replica m;   x <- Nesterov(x, D);   x_m <- x

             The inner optimizer's state is never exchanged. H 30 costs little quality, H 100 to 500 suits links of 1 Gbit/s and
             less.

streaming    diloco by fragments, one at a time, while training goes on (Douillard et al. 2025, arXiv 2501.18512):

                 fragment p is sent at step t if (t - t_p) mod H = 0, and applied at t + tau:
                 x^p <- Nesterov(x^p, mean_m D^p_m),   x^p_m <- alpha x^p_m + (1 - alpha) x^p   (or `arrival = "add"`)

             Fragments are strides of whole layers, so the peak of what is sent is a fraction of the model, and the
             exchange hides under tau steps. tau up to 5 costs little; outer gradients in 4 bits cost nothing ([compress] kind =
             "fp4" or "int4", with feedback).

sparseloco   sparse, coarse pseudo-gradients; error feedback in the place of momentum (Sarfi et al. 2025, arXiv 2508.15706):

                 e_m <- beta e_m + D_m,   S_m = Q(TopK(e_m)),   e_m <- e_m - S_m,   x <- x - eta mean_m S_m

             with the 64 largest of each 4096 values and beta = 0.95, in the exchange (`config.compress.SPARSELOCO`, which is
             taken where [compress] is not given), eta = 1, and H = 30. Embeddings and vectors are coded too.

muloco       diloco whose inner optimizer is Muon, `train.optimizer.kind = "muon"` (Therien et al. 2025, arXiv 2505.23725). Its
             pseudo-gradients are better conditioned than AdamW's, so that 4 bits lose nothing and the outer momentum may be
             smaller: eta = 0.7, mu = 0.6, H = 30. Embeddings and vectors are trained by AdamW within the replica.
"""

from dataclasses import replace

from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import make_exchange
from thinwire.compress.plain import PlainExchange
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.sync import Auto, DiLoCo, EveryStep, LocalSGD, MuLoCo, NoLoCo, Retrace, SparseLoCo, Streaming, Sync
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.sync.after_backward import AfterBackwardSync
from thinwire.sync.as_reduced import AsReducedSync
from thinwire.sync.base import Synchroniser
from thinwire.sync.every_step import EveryStepSync
from thinwire.sync.expert_ranks import ExpertRanksSync
from thinwire.sync.local_steps import LocalStepsSync, Schedule
from thinwire.sync.noloco import NoLoCoSync
from thinwire.sync.outer import Nesterov, published_learning_rate
from thinwire.sync.retrace import RetraceSync
from thinwire.sync.single_rank import SingleRank

DATA, OUTER = "data", "outer"
AVERAGE = Nesterov(1.0, 0.0)
STREAMING_LEARNING_RATE, STREAMING_MIXING = 0.4, 0.5
"""As published."""


def make_synchroniser(config: Sync, compress: NoCompression | Coded, layout: Layout, ledger: Ledger) -> Synchroniser:
    """Every step over the data axis, or rarely over the outer axis with every step inside. UserError if options do not fit.

    Compression belongs to the rare exchange if there is one; inside, gradients travel as they are.
    """
    if isinstance(config, EveryStep):
        return _every_step(config, compress, layout, ledger)
    if isinstance(config, NoLoCo):
        return NoLoCoSync(config, compress, OUTER, ledger, _inside(config, layout, ledger))
    if isinstance(config, Retrace):
        return RetraceSync(config, OUTER, ledger, make_exchange(compress, ledger, moments=True))
    if isinstance(config, Auto):
        raise UserError("sync.kind = 'auto' is for thinwire train, which chooses before ranks start; name a kind here")
    schedule, outer = method(config, layout.outer)
    schedule = replace(schedule, on_host=config.outer_device == "host")
    return LocalStepsSync(schedule, outer, OUTER, ledger, make_exchange(compress, ledger), _inside(config, layout, ledger))


def method(config: Sync, replicas: int) -> tuple[Schedule, Nesterov]:
    """When replicas send what, and by which outer step it is applied."""
    match config:
        case LocalSGD():
            return Schedule(every=config.every), AVERAGE
        case DiLoCo() | MuLoCo():
            rate = config.outer_learning_rate or published_learning_rate(replicas)
            return Schedule(every=config.every, first=config.first), Nesterov(rate, config.outer_momentum)
        case SparseLoCo():
            return Schedule(every=config.every, first=config.first), Nesterov(config.outer_learning_rate, 0.0)
        case Streaming():
            mixing = STREAMING_MIXING if config.mixing is None else config.mixing
            schedule = Schedule(
                every=config.every,
                first=config.first,
                layers_per_fragment=config.layers_per_fragment,
                overlap=config.overlap,
                mixing=mixing if config.overlap else 0.0,
                adds=config.arrival == "add",
            )
            return schedule, Nesterov(config.outer_learning_rate or STREAMING_LEARNING_RATE, config.outer_momentum)
    raise AssertionError(config)


def _inside(config: Sync, layout: Layout, ledger: Ledger) -> Synchroniser:
    """What holds the ranks of one replica together."""
    if layout.data * layout.expert == 1:
        for key in ("every_inside", "bucket_bytes"):
            if getattr(config, key, 0):
                raise UserError(
                    f"sync.{key} = {getattr(config, key)} is about the ranks of one replica, and each replica is one rank "
                    "(layout.data = 1); leave it out, or set layout.data"
                )
        return SingleRank(config.accumulate)
    if isinstance(config, LocalSGD) and config.every_inside:
        if config.bucket_bytes:
            raise UserError(
                f"sync.bucket_bytes = {config.bucket_bytes} has no effect with every_inside, which sends whole models"
            )
        alone = SingleRank(config.accumulate)
        schedule = Schedule(every=config.every_inside, on_host=config.outer_device == "host")
        return LocalStepsSync(schedule, AVERAGE, DATA, ledger, PlainExchange(ledger), alone)
    inner = EveryStep(accumulate=config.accumulate, bucket_bytes=config.bucket_bytes)
    return _every_step(inner, NoCompression(), layout, ledger)


def _every_step(config: EveryStep, compress: NoCompression | Coded, layout: Layout, ledger: Ledger) -> Synchroniser:
    """Within the backward pass, but where a pipeline makes many."""
    if layout.expert > 1:
        return ExpertRanksSync(config, compress, layout, ledger)
    exchange = make_exchange(compress, ledger, moments=True)
    if layout.pipe > 1:
        return AfterBackwardSync(config, DATA, ledger, exchange)
    kind = EveryStepSync if layout.shard == 1 else AsReducedSync
    return kind(config, DATA, ledger, exchange)
