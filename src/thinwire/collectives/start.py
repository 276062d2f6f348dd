"""`thinwire.init()`: torch.distributed over gloo, with collectives chosen for the network that it runs on."""

from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from thinwire.cluster import load_cluster
from thinwire.collectives import backend
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.scheduled import register_scheduled
from thinwire.collectives.tuned.advice import Advisor
from thinwire.collectives.tuned.cache import Cache, beside
from thinwire.collectives.tuned.tuner import Tuner
from thinwire.errors import UserError

Collectives = Literal["measured", "priced", "native"]


def init(
    cluster: str | None = None, *, collectives: Collectives = "measured", cache: str | None = None, **options: Any
) -> Ledger:
    """Instead of `torch.distributed.init_process_group(**options)`, on every rank; DDP, FSDP2, DTensor and user code stay as is.

    cluster: a cluster file (`thinwire probe` writes one) or the name of a shipped one, whose ranks are those of the job; without
    one all cards are taken for equal, and more is left to measuring. collectives: "measured" tries the few best by price on the
    ranks when an op is first used in a class of sizes, and keeps the backend's own unless another is faster; "priced" takes the
    best by price at once; "native" leaves all as it is. cache: where rank 0 keeps what was measured; default: beside the cluster
    file. Returns the ledger of what is sent. UserError for a bad cluster file or setting. For CPUs: on CUDA stay with NCCL.
    """
    ledger = Ledger()
    if collectives == "native":
        backend.register(ledger)
    elif collectives in ("measured", "priced"):
        known = None if cluster is None else load_cluster(cluster)
        path = Path(cache) if cache else beside(Path(cluster)) if cluster is not None and Path(cluster).is_file() else None
        register_scheduled(ledger, Tuner(Advisor(known), Cache(path), measures=collectives == "measured"))
    else:
        raise UserError(f"collectives = {collectives!r}; there are 'measured', 'priced' and 'native'")
    dist.init_process_group(backend.NAME, **options)
    return ledger
