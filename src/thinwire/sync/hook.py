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
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from thinwire.collectives.backend import ledger_of
from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import Exchange, make_exchange
from thinwire.compress.precondition import moments_of
from thinwire.config.compress import Coded, NonFinite
from thinwire.errors import UserError
from thinwire.sync.buckets import Names, exchange_bucket
from thinwire.tomlfile import validate


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


def compress_gradients(
    replica: DistributedDataParallel,
    kind: str,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    nonfinite: NonFinite = "average",
    **options: Any,
) -> Exchange:
    """Average the gradients of `replica` through the codec `kind` ("bf16", "int8", "int4", ...) from now on.

    Gradients may be float32, bfloat16, float16, float64 and complex, mixed as they come, and sparse ones, which are averaged
    exactly. Call once, before the first forward pass, on all ranks of the default group, also where replicas form sub-groups.

    optimizer: that trains `replica`. Where it keeps second moments beside the parameters, as AdamW does, int4 and coarser
    kinds with a scale a block code gradients in their units (`compress.precondition`), which costs no byte and learns better.

    nonfinite: "average": a gradient that is not finite on some rank arrives so on all, as without compression, and what the step
    has changed of the residuals is taken back: a GradScaler leaves the step out on all ranks. This holds two memories from
    where a bucket is sent to the end of the backward pass. "raise": every rank raises a UserError that names parameter, rank and
    step.
    options: as in the section [compress] of run.toml: feedback, exclude, vectors, fused.

    UserError for what is no DistributedDataParallel, a second call, one after the first forward pass, an unknown kind, and an
    option that does not exist or would have no effect. What goes wrong later, on any rank, backward() raises on each, as
    UserError.
    """
    config = validate(Coded, {"kind": kind, **options}, "compress_gradients")
    _check(replica, nonfinite)
    ledger = ledger_of(replica.process_group) or Ledger()
    exchange = make_exchange(config, ledger, nonfinite, moments=optimizer is not None)
    names = Names(replica.module)
    use = Use(replica.module.parameters()) if replica.find_unused_parameters or replica.static_graph else None
    moments = moments_of(optimizer, names.trained)
    exchange.attach(replica.process_group, "data", names.shapes, names.device, tracks_use=use is not None, moments=moments)
    try:
        replica.register_comm_hook((exchange, names, use), _hook)
    except RuntimeError as error:
        exchange.detach()
        raise UserError(
            f"compress_gradients: {str(error).splitlines()[0]}; call it once, before the first backward pass"
        ) from None
    return exchange


def _check(replica: Any, nonfinite: str) -> None:
    if not isinstance(replica, DistributedDataParallel):
        raise UserError(
            f"compress_gradients takes a DistributedDataParallel, not {type(replica).__name__}; "
            "for FSDP2 there is compress_sharded"
        )
    if nonfinite not in get_args(NonFinite):
        raise UserError(f"compress_gradients: nonfinite = {nonfinite!r}; there are {', '.join(map(repr, get_args(NonFinite)))}")
    if passes := replica._get_ddp_logging_data().get("iteration", 0):
        raise UserError(f"compress_gradients: {passes} forward passes are over; call it before the first")


def _note(reached: set[int], parameter: torch.Tensor) -> None:
    reached.add(id(parameter))


def _hook(state: tuple[Exchange, Names, Use | None], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    exchange, names, use = state
    return exchange_bucket(exchange, names, bucket, use.take(bucket, names) if use else None)
