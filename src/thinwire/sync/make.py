"""The synchroniser that [sync] asks for."""

from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import make_exchange
from thinwire.compress.plain import PlainExchange
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.sync import EveryStep, LocalSGD, NoLoCo, Sync
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.sync.base import Synchroniser
from thinwire.sync.every_step import EveryStepSync
from thinwire.sync.local_steps import LocalStepsSync, Schedule
from thinwire.sync.methods import AVERAGE, method
from thinwire.sync.noloco import NoLoCoSync
from thinwire.sync.single_rank import SingleRank

DATA, OUTER = "data", "outer"


def make_synchroniser(config: Sync, compress: NoCompression | Coded, layout: Layout, ledger: Ledger) -> Synchroniser:
    """Every step over the data axis, or rarely over the outer axis with every step inside. UserError if options do not fit.

    Compression belongs to the rare exchange if there is one; inside, gradients travel as they are.
    """
    if isinstance(config, EveryStep):
        return EveryStepSync(config, DATA, ledger, make_exchange(compress, ledger))
    if isinstance(config, NoLoCo):
        return NoLoCoSync(config, compress, OUTER, ledger, _inside(config, layout, ledger))
    schedule, outer = method(config, layout.outer)
    return LocalStepsSync(schedule, outer, OUTER, ledger, make_exchange(compress, ledger), _inside(config, layout, ledger))


def _inside(config: Sync, layout: Layout, ledger: Ledger) -> Synchroniser:
    """What holds the ranks of one replica together."""
    if layout.data == 1:
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
        return LocalStepsSync(Schedule(every=config.every_inside), AVERAGE, DATA, ledger, PlainExchange(ledger), alone)
    inner = EveryStep(accumulate=config.accumulate, bucket_bytes=config.bucket_bytes)
    return EveryStepSync(inner, DATA, ledger, PlainExchange(ledger))
