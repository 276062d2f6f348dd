"""One line for users of plain DistributedDataParallel: `thinwire.compress_gradients(replica, "int4")`.

The training loop, the optimizer and `no_sync` stay as they are; any number of buckets, unused parameters and sub-groups are fine.
What is owed to the average is kept by parameter name: save `state_dict()` of what is returned on every rank, load it before the
first step.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import Exchange, make_exchange
from thinwire.config.compress import Coded
from thinwire.sync.buckets import exchange_bucket, names_of
from thinwire.tomlfile import validate


def compress_gradients(replica: DistributedDataParallel, kind: str, **options: Any) -> Exchange:
    """Average the gradients of `replica` through the codec `kind` ("bf16", "int8", "int4", ...) from now on.

    options: as in the section [compress] of run.toml: feedback, exclude, vectors, fused. Call once, before the first forward
    pass, on all ranks of the default group, also where replicas form sub-groups. UserError for an unknown kind or option.
    """
    config = validate(Coded, {"kind": kind, **options}, "compress_gradients")
    exchange = make_exchange(config, Ledger())
    exchange.attach(replica.process_group, "data")
    replica.register_comm_hook((exchange, names_of(replica.module)), _hook)
    return exchange


def _hook(state: tuple[Exchange, dict[int, str]], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return exchange_bucket(*state, bucket)
