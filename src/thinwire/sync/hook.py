"""One line for users of plain DistributedDataParallel: `thinwire.compress_gradients(replica, "int4")`.

The training loop, the optimizer and `no_sync` stay as they are; any number of buckets, unused parameters and sub-groups are fine.
Error-feedback residuals are kept by parameter name: save `state_dict()` of what is returned on every rank, load it before the
first step.

With find_unused_parameters (or static_graph) DistributedDataParallel throws away what comes back for a parameter that no rank has
used in a step. So use is tracked there, from the gradients that autograd accumulates, and nothing of such a parameter counts as
sent (`compress.averager`).
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import Exchange, make_exchange
from thinwire.config.compress import SUMMABLE, Coded
from thinwire.errors import UserError
from thinwire.sync.buckets import Names, exchange_bucket
from thinwire.tomlfile import validate

CODED_TYPES = (torch.float32, torch.complex64)


class Use:
    """Which parameters this rank's backward passes have reached since they were last exchanged."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._reached: set[int] = set()
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_note, self._reached))

    def take(self, bucket: dist.GradBucket, names: Names) -> dict[str, bool]:
        """Of a bucket's parameters, by name; from now on they count as not reached."""
        parameters = bucket.parameters()
        found = {names.of(parameter): id(parameter) in self._reached for parameter in parameters}
        self._reached.difference_update(map(id, parameters))
        return found


def compress_gradients(replica: DistributedDataParallel, kind: str, **options: Any) -> Exchange:
    """Average the gradients of `replica` through the codec `kind` ("bf16", "int8", "int4", ...) from now on.

    options: as in the section [compress] of run.toml: feedback, exclude, vectors, fused. Call once, before the first forward
    pass, on all ranks of the default group, also where replicas form sub-groups. UserError for an unknown kind, an option that
    does not exist or would have no effect, and parameters that cannot be coded.
    """
    config = validate(Coded, {"kind": kind, **options}, "compress_gradients")
    exchange = make_exchange(config, Ledger())
    _check(replica, kind)
    names = Names(replica.module)
    use = Use(replica.module.parameters()) if replica.find_unused_parameters or replica.static_graph else None
    exchange.attach(replica.process_group, "data", names.shapes, tracks_use=use is not None)
    try:
        replica.register_comm_hook((exchange, names, use), _hook)
    except RuntimeError as error:
        exchange.detach()
        raise UserError(
            f"compress_gradients: {str(error).splitlines()[0]}; call it once, before the first backward pass"
        ) from None
    return exchange


def _check(replica: DistributedDataParallel, kind: str) -> None:
    for name, parameter in replica.module.named_parameters():
        if parameter.requires_grad and parameter.dtype not in CODED_TYPES and kind not in SUMMABLE:
            raise UserError(
                f"compress_gradients: {name} is {str(parameter.dtype).removeprefix('torch.')}, and {kind} takes float32 and "
                f"complex64 only yet; keep the parameters in float32 under autocast, or take one of {', '.join(sorted(SUMMABLE))}"
            )
    for name, module in replica.module.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise UserError(f"compress_gradients: {name or 'the model'} has sparse gradients; make it with sparse=False")


def _note(reached: set[int], parameter: torch.Tensor) -> None:
    reached.add(id(parameter))


def _hook(state: tuple[Exchange, Names, Use | None], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    exchange, names, use = state
    return exchange_bucket(exchange, names, bucket, use.take(bucket, names) if use else None)
