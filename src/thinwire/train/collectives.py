"""Which collectives a run uses, as [collectives] says, and the prediction for them."""

from collections.abc import Mapping, Sequence

import torch.distributed as dist

from thinwire.cluster import Cluster
from thinwire.collectives.carrier import Carrier, Native
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.mpi.start import Mpi
from thinwire.collectives.scheduled import ScheduledGroup
from thinwire.collectives.start import register
from thinwire.collectives.synthesis.bounds import OPS
from thinwire.collectives.tuned.carrier import Chosen
from thinwire.collectives.tuned.tuner import Tuner, make_tuner
from thinwire.config.run import RunConfig
from thinwire.traffic import Transfer
from thinwire.train.forecast import find_cluster
from thinwire.train.runtime import Environment


def set_collectives(config: RunConfig, environment: Environment, ledger: Ledger, mpi: Mpi | None = None) -> Tuner | None:
    """Register the metered backend; None where all is left to the carrier. On every rank, before the process group is made."""
    kind, place, lab, named = config.collectives.kind, environment.place, environment.lab, config.cluster.file
    assert place is not None, "a launcher has started this process"
    tuner = None
    if kind != "native":
        cluster = find_cluster(named, lab.cluster if lab else None, place.world_size) if lab or named else None
        tuner = make_tuner(cluster, "" if lab else named, measures=kind == "measured")
    register(ledger, tuner, mpi)
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
