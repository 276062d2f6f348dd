"""A user's own loop over a model that a layout shares out: every axis that `thinwire train` has, by the same functions.

torch.distributed.init_process_group("gloo")
shared = thinwire.apply(model, {"pipe": 2, "data": 2}, (inputs, targets), micro_batches=4, compress="int8")
optimizer = torch.optim.AdamW(shared.module.parameters())
with shared.training(optimizer):
    for batches in data:                         # micro-batches (inputs, targets) of this replica
        loss = shared.step(batches)              # gradients are there, averaged over all replicas
        optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thinwire.cluster import load_cluster
from thinwire.cluster.order import along_links, in_order
from thinwire.collectives import backend
from thinwire.collectives.ledger import Ledger
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.models.transformer import Transformer, cross_entropy
from thinwire.parallel import plans, tensor
from thinwire.parallel.apply import apply as apply_axes
from thinwire.parallel.balance import shares_tied
from thinwire.parallel.mesh import make_own_mesh
from thinwire.parallel.plans import has_plans
from thinwire.parallel.sharded import found_units
from thinwire.parallel.standalone import costs_by_size
from thinwire.parallel.tensor_parts import Parts
from thinwire.sync.make import make_synchroniser
from thinwire.tomlfile import validate
from thinwire.traffic import Transfer
from thinwire.train.outline import outline_of_applied, workload_of
from thinwire.train.part import Part, Place, take_part
from thinwire.train.sharded_part import ShardedPart
from thinwire.train.step import Named, Stepper, gradient_norm
from thinwire.workload import Workload

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Any, Tensor], Tensor]
SECTIONS = ("tensor", "pipeline", "sharded", "experts", "sync", "compress")
REPORT = "report"


def apply(
    model: nn.Module,
    layout: Mapping[str, int],
    example: Batch,
    *,
    loss: Loss | None = None,
    units: Sequence[str] | None = None,
    **options: Any,
) -> SharedModel:
    """Share out `model` over all ranks by `layout`, in place. Collective over all ranks, on each of which the model is the same,
    whole and on the device where it is to run.

    layout: degrees as in [layout] of run.toml, {"pipe": 2, "tensor": 2}; `data` (`outer` with a rare sync) takes the ranks that
    are left. example: one micro-batch, (inputs, targets), of the shapes that all will have. loss(output, target): the mean of a
    micro-batch, a scalar; None: of thinwire's Transformer, its own, with targets [B, L] of which -100 do not count.

    Any model goes with data, outer and shard, an nn.Sequential with pipe too, a Transformer with all axes. A causal language
    model of Hugging Face's transformers goes with tensor and pipe where it has plans for them; its loss gets the logits, None is
    that of a Transformer. units: names of the modules that shards gather at once and that recompute="full" computes again; None:
    the members of the longest nn.ModuleList.

    options: micro_batches of a step and replica (1), clip (0: none), recompute ("none"); cluster, a file or a shipped one's name,
    by whose links the ranks are placed; tables as the sections of run.toml: tensor, pipeline, sharded, experts, sync, compress,
    of which the last two may be the kind alone. UserError for what does not go together, as of `thinwire train`.
    """
    if not dist.is_initialized():
        raise UserError('apply: there is no process group; call torch.distributed.init_process_group("gloo") before')
    given = _Given(model, example, loss, units)
    if loss is None and has_plans(model):
        model.loss = cross_entropy  # type: ignore[assignment]
    elif loss is None and given.shape is None:
        raise UserError(f"apply: a {type(model).__name__} has no loss of its own; give loss(output, target)")
    cluster = options.pop("cluster", "")
    config = _config(given, layout, options)
    return SharedModel(given, config, config.layout.resolve(dist.get_world_size(), rare=config.sync.rare), cluster)


class SharedModel:
    """What `apply` has left on this rank. Its methods are collective over all ranks, unless they say otherwise."""

    def __init__(self, given: _Given, config: RunConfig, layout: Layout, cluster: str) -> None:
        self.layout, self.ledger, self._given, self._config = layout, Ledger(), given, config
        device, size = given.device, dist.get_world_size()
        order, rates = tuple(range(size)), None
        if cluster:
            known = load_cluster(cluster)
            layout.check(known.world_size)
            order = along_links(known)
            rates = in_order(known, order).declared_rates
        name = None
        if device.type == "cpu":  # behind a meter that writes into our own ledger: a backend by a name that nobody else has
            name = f"{backend.NAME}-apply-{len(dist.Backend.backend_list)}"
            backend.register(self.ledger, name)
        self.order = order
        """By place in the layout, the rank that has it."""
        self.mesh, self.groups = make_own_mesh(layout, device.type, order, name)
        self.replica = layout.replica(order.index(dist.get_rank()))
        """Whose tokens this rank computes, of `layout.replicas`."""
        number = order.index(dist.get_rank())
        place = Place(layout=layout, rank=number, groups=self.groups, ledger=self.ledger, device=device, rates=rates)
        self._part = take_part(given, config, place) if given.shape else _any_part(given, config, place)  # type: ignore[arg-type]
        self._sync = make_synchroniser(config.sync, config.compress, layout.of_gradients, self.ledger)
        self._stepper: Stepper | None = None
        self._gradients: list[Tensor | None] = []

    @property
    def module(self) -> nn.Module:
        """All that this rank trains, under the names of the whole model: for an optimizer, and for what is saved."""
        return self._part.module

    @property
    def has_loss(self) -> bool:
        """Whether `step` gives a loss here: in a pipeline, where the last stage is."""
        return self._part.pipeline is None or self._part.pipeline.has_last

    def traffic(self) -> list[Transfer]:
        """What this rank sends in a step, exactly, without evaluations. Local."""
        part = self._part
        found = [*part.outline.sent, *self._sync.traffic(part.workload, self.layout.of_gradients)]
        return [one for one in found if len(self.layout.senders(one.axis)[0]) > 1]

    @contextmanager
    def training(self, optimizer: torch.optim.Optimizer) -> Iterator[SharedModel]:
        """Around all steps. optimizer: of the parameters of `module`. First some passes are made whose gradients nobody sees; a
        rare sync exchanges after steps of the optimizer, and once more at the end."""
        part, config, done = self._part, self._config, 0

        def after(*_: Any) -> None:
            nonlocal done
            self._sync.after_step(done)
            done += 1
            self.ledger.step = done

        with self._sync.attached(part.module, optimizer, self.mesh) as attached:
            self._stepper = part.stepper(attached, optimizer, self._sync, self._given, config.train)  # type: ignore[arg-type]
            with self.ledger.label("replica set-up"), part.waits.set_up():
                self._stepper.rehearse(self._given.example)
            self._gradients = [one.grad for one in part.module.parameters()]
            hook = optimizer.register_step_post_hook(after)
            try:
                yield self
                self._sync.finish()
            finally:
                hook.remove()
                self._stepper = None

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """Forward and backward passes of this replica's micro-batches; then parameters have the gradients of the mean over those
        of all replicas, clipped, in the place of those of the step before. Returns this rank's mean loss, [], detached; 0 where
        `has_loss` is not so. UserError outside of `training`, and for another number of micro-batches."""
        if self._stepper is None:
            raise UserError("apply: step() belongs into `with shared.training(optimizer):`, which brings the replicas together")
        if len(batches) != self._config.sync.accumulate:
            raise UserError(
                f"apply: a step of {len(batches)} micro-batches, and {self._config.sync.accumulate} were announced; say "
                f"micro_batches={len(batches)}"
            )
        for parameter, gradient in zip(self.module.parameters(), self._gradients, strict=True):
            parameter.grad = gradient  # of a bucket, whatever zero_grad() has done
            if gradient is not None:
                gradient.zero_()
        loss = self._stepper.passes(batches, len(batches), len(batches))
        if self._config.train.clip:
            self._stepper.clip()
        return loss.detach()

    def mean(self, loss: Tensor) -> float:
        """Of what `step` gave on all ranks: the mean over the replicas, on all ranks."""
        total = loss.detach().double()
        with self.ledger.label(REPORT):
            dist.all_reduce(total)
        return float(total) / (self.layout.replicas * self.layout.tensor * self.layout.seq)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, `module` holds the parameters that count, where replicas exchange rarely. Local."""
        return self._sync.averaged()

    def close(self) -> None:
        """Ends the threads that it has."""
        self._part.close()


@dataclass(frozen=True)
class _Given:
    """The user's model, as a task for what `thinwire train` is made of. shape: of a Transformer."""

    model: nn.Module
    example: Batch
    own_loss: Loss | None
    units: Sequence[str] | None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def shape(self) -> ModelConfig | None:
        if not isinstance(self.model, Transformer):
            return None
        dtype = str(next(self.model.parameters()).dtype)[6:]
        return self.model.config.model_copy(update={"dtype": dtype})

    @property
    def workload(self) -> Workload:
        assert self.shape is not None, "of a Transformer"
        return Workload.of_transformer(self.shape, *self.example[0].shape)

    def build_model(self) -> nn.Module:
        return self.model

    def batch(self, step: int, index: int) -> Batch:
        return self.example

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """`model` has this one's part in it."""
        inputs, targets = (one.to(self.device) for one in batch)
        if has_plans(self.model):
            own: Any = self.own_loss or self.model.loss
            loss: Tensor = own(model(inputs, use_cache=False).logits, targets)
        else:
            loss = model(inputs, targets) if self.own_loss is None else self.own_loss(model(inputs), targets)
        return loss


def _config(given: _Given, layout: Mapping[str, int], options: dict[str, Any]) -> RunConfig:
    """As of a run.toml that says so, checked as that."""
    usual = {"micro_batches": 1, "clip": 0, "recompute": "none"}
    micro, clip, recompute = (options.pop(name, value) for name, value in usual.items())
    if unknown := sorted(set(options) - set(SECTIONS)):
        known = "micro_batches, clip, recompute, cluster"
        raise UserError(f"apply: there is no option {unknown[0]!r}; there are {known}, {', '.join(SECTIONS)}")
    sections = {name: {"kind": value} if isinstance(value, str) else dict(value) for name, value in options.items()}
    sync = {"kind": "every_step", **sections.pop("sync", {})}
    if taken := {"accumulate", "assign"} & set(sync):
        raise UserError(f"apply: sync.{min(taken)} is about batches, which are yours; leave it out, and say micro_batches=")
    if "copies" in sections.get("pipeline", {}):
        raise UserError("apply: pipeline.copies asks which sample a row is, and batches are yours; leave it out")
    inputs = given.example[0]
    rows, length = inputs.shape if given.shape is not None else (len(inputs), 2)
    train = {"micro_batch": rows, "sequence": length, "clip": clip, "recompute": recompute, "optimizer": {"kind": "adamw"}}
    content = {**sections, "layout": dict(layout), "sync": {**sync, "accumulate": micro}, "train": train}
    if given.shape is not None:
        return validate(RunConfig, {**content, "model": given.shape.model_dump()}, "apply")
    if layout.get("shard", 1) > 1 and layout.get("tensor", 1) > 1:
        degrees = f"layout.shard = {layout['shard']} and layout.tensor = {layout['tensor']}"
        raise UserError(f"{degrees} go together in thinwire's Transformer, not in a model by its plan; set one of them to 1")
    drawn = any(isinstance(one, nn.Dropout) and one.p for one in given.model.modules())
    if recompute != "none" and drawn:
        raise UserError(f"apply: recompute={recompute!r}: a {type(given.model).__name__} has dropout, which would be drawn anew")
    if recompute not in ("none", "full"):
        raise UserError(f"apply: recompute={recompute!r} is for thinwire's Transformer; of any other model take 'full' or 'none'")
    section = validate(type(RunConfig().layout), dict(layout), "apply: layout")  # what the model cannot take, its axes refuse
    return validate(RunConfig, content | {"layout": {}}, "apply").model_copy(update={"layout": section})


def _any_part(given: _Given, config: RunConfig, place: Place) -> Part:
    """As `take_part`, of a model of which only the modules are known."""
    layout, model = place.layout, given.model
    kinds = {}
    if config.train.recompute == "full":
        kinds = dict.fromkeys(found_units(model) if given.units is None else given.units, "full")
    more: dict[str, Any] = {"recompute": kinds, "units": given.units}
    if layout.pipe * layout.tensor > 1:
        if has_plans(model):
            plans.check(model, given.example[0].to(place.device), splits=layout.tensor > 1)
        more |= {"example": given.example[0].to(place.device), "loss": given.own_loss}
        more |= {"costs": costs_by_size(model)} if layout.pipe > 1 else {}
    asked = place.asked(config, **more)
    applied = apply_axes(model, asked)
    buffers = [name for name, _ in model.named_buffers()]  # of which each rank keeps its own, in every layout
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(applied.module, buffers)
    shared, norm, pipeline, stage_shards = None, gradient_norm, applied.pipeline, applied.stage_shards
    if layout.tensor > 1:
        norm = partial(_tensor_norm, applied.parts, place)
    if applied.shards is not None:
        shared = ShardedPart.of(applied, workload_of(applied.shards), config, asked)
        norm = shared.norm
    if stage_shards is not None:
        norm = stage_shards.norm_of
    if pipeline is not None and pipeline.cut.tied():
        pipeline.tied.shares = shares_tied(config.compress, layout)
    return Part(
        module=applied.module,
        outline=outline_of_applied(config, applied, layout, kinds),
        precision=place.precision,
        norm=norm,
        waits=applied.waits,
        sharded=shared,
        stage_shards=stage_shards,
        pipeline=pipeline,
    )


def _tensor_norm(parts: Parts, place: Place, named: Named) -> Tensor:
    plain = ((name.removeprefix("module."), one) for name, one in named)
    return tensor.gradient_norm(plain, parts, place.groups["tensor"], place.ledger)
