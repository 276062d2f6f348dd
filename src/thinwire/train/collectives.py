"""Which collectives a run uses, as [collectives] says, and the prediction for them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from thinwire.cluster import Cluster
from thinwire.collectives import backend
from thinwire.collectives.carrier import Carrier, Native
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.scheduled import OPS, ScheduledGroup, register_scheduled
from thinwire.collectives.tuned.advice import Advisor
from thinwire.collectives.tuned.cache import Cache, beside
from thinwire.collectives.tuned.carrier import Chosen
from thinwire.collectives.tuned.tuner import Tuner
from thinwire.config.run import RunConfig
from thinwire.traffic import Transfer
from thinwire.train.forecast import find_cluster
from thinwire.train.runtime import Surroundings


def set_collectives(config: RunConfig, surroundings: Surroundings, ledger: Ledger) -> Tuner | None:
    """Register the metered backend; None where all is left to gloo. On every rank, before the process group is made."""
    kind, place, lab = config.collectives.kind, surroundings.place, surroundings.lab
    if kind == "native" or place is None:
        backend.register(ledger)
        return None
    known, named = bool(lab or config.cluster.file), Path(config.cluster.file)
    cluster = find_cluster(config.cluster.file, lab.cluster if lab else None, place.world_size) if known else None
    kept = beside(named) if not lab and known and named.is_file() else None
    tuner = Tuner(Advisor(cluster), Cache(kept), measures=kind == "measured")
    register_scheduled(ledger, tuner)
    return tuner


def carrier(
    tuner: Tuner | None, cluster: Cluster, groups: Mapping[str, dist.ProcessGroup], transfers: Sequence[Transfer]
) -> Carrier:
    """Decides about all `transfers` now, by axis, so that they can be predicted. Collective: every rank, the same transfers."""
    if tuner is None:
        return Native()
    for transfer in transfers:
        group = groups.get(transfer.axis)
        if isinstance(group, ScheduledGroup) and transfer.op in OPS:
            group.prepare(transfer.op, transfer.message_bytes)
    return Chosen(tuner, cluster)
