"""A user's own loop over a pipeline: the model is cut, this rank keeps its stages, and what crosses between them may be coded.

torch.distributed.init_process_group("gloo")
pipeline = thinwire.pipeline(model, inputs[0], loss, activations="int8", gradients="int8")
optimizer = torch.optim.AdamW(pipeline.owner.parameters())
for inputs, targets in data:                     # lists of micro-batches, all of one shape
    losses = pipeline.step(inputs, targets, 1 / len(inputs))
    pipeline.add_up_tied()                       # of weights that the first and the last stage share
    optimizer.step()
    optimizer.zero_grad()
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives import backend
from thinwire.collectives.groups import private_copy
from thinwire.collectives.ledger import Ledger
from thinwire.config.pipeline import PipelineSection
from thinwire.errors import UserError
from thinwire.parallel.chain import chain_of
from thinwire.parallel.cut import cut_model
from thinwire.parallel.pipeline import Loss, Pipeline
from thinwire.tomlfile import validate


def pipeline(
    model: nn.Module,
    example: Tensor,
    loss: Loss,
    *,
    group: dist.ProcessGroup | None = None,
    costs: Sequence[float] | None = None,
    **options: Any,
) -> Pipeline:
    """Stages of `model` on the ranks of `group` (None: all ranks), in their order. Collective over all ranks.

    model: a `Transformer` of thinwire or an nn.Sequential, alike on every rank, on the device where it is to run; example: the
    input of one micro-batch; loss(output, target): the mean of a micro-batch, a scalar. costs: of each unit of the model, such as
    its seconds, so that stages are balanced; None: by its number of parameters. options: as in [pipeline] of run.toml: schedule,
    stages_per_rank, activations, gradients, copies (for which `samples` are set before each step). What is sent on CPUs is in
    `ledger`. UserError for what cannot be cut so.
    """
    if not dist.is_initialized():
        raise UserError('pipeline: there is no process group; call torch.distributed.init_process_group("gloo") before')
    section = validate(PipelineSection, options, "pipeline")
    whole = group if group is not None else dist.group.WORLD
    assert whole is not None, "there is a default group"
    ledger = Ledger()
    device = next(model.parameters()).device
    name = None
    if device.type == "cpu":  # behind a meter that writes into our own ledger: a backend by a name that nobody else has
        name = f"{backend.NAME}-pipe-{len(dist.Backend.backend_list)}"
        backend.register(ledger, name)
    own = private_copy(whole, "mesh_pipe", name)
    cut = cut_model(model, example, section, own.size(), costs or costs_by_size(model))
    return Pipeline(model, cut, own, ledger, loss)


def costs_by_size(model: nn.Module) -> list[float]:
    """Of each unit the number of its parameters, and one more, so that none is free."""
    units = chain_of(model)
    return [1.0 + sum(one.numel() for name in unit.modules for one in model.get_submodule(name).parameters()) for unit in units]
