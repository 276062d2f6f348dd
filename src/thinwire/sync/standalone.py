"""A user's own loop as one replica of DiLoCo or its kin: it trains alone, and every H steps the replicas come together.

    torch.distributed.init_process_group("gloo")
    with thinwire.DiLoCo(model, inner_optimizer, every=30) as outer:
        for batch in my_share_of_the_data:
            loss_of(model, batch).backward()
            inner_optimizer.step()                     # every 30th: exchange, and the outer step
            inner_optimizer.zero_grad()
        with outer.averaged():
            evaluate(model)
    # here the model holds the averaged parameters, the same on all replicas

`torch.optim` calls us after each step of the inner optimizer; nothing else in the loop changes. All replicas must make the same
number of steps: one that skips a step lets the others wait.

At `with` all begin from the first replica's parameters and buffers, which are sent only if any differ; later on buffers (batch
statistics) stay each replica's own. Parameters may be float32, bfloat16, float16, float64 and complex, mixed (`nested`). The
exchange has a group of its own, on CPUs a metered one whatever the user's backend, made with the same time-out and ended with the
block: what it sends is in `ledger`. Frozen parameters are neither kept nor sent. The methods are in `make` and `noloco`.

Parameters may lie on a device, all on one, that a backend of the group serves; then the exchange has a group on the user's own
backend, and nothing waits for the device but set-up, a state that is saved, and the end of the block.

The block may be entered again, once per epoch: outer momentum and error-feedback residuals go on. After an exception, and after
`load_state_dict`, replicas go on from where each of them is; the state is used once.

A replica may itself be several ranks, and the user's loop what holds them together: DistributedDataParallel, or FSDP2, where each
rank exchanges its shards only (`shards`), alone or with `thinwire.compress_sharded`:

    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("outer", "shard"))
    fully_shard(model, mesh=mesh["shard"])
    with thinwire.DiLoCo(model, inner_optimizer, group=mesh["outer"]) as outer: ...
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from thinwire.collectives import backend
from thinwire.collectives.groups import backend_of, private_copy, release
from thinwire.collectives.ledger import Ledger
from thinwire.config import sync as kinds
from thinwire.config.compress import SPARSELOCO, Coded, NoCompression, read_coding
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.sync.initial_values import make_same
from thinwire.sync.make import OUTER, make_synchroniser
from thinwire.sync.shards import Shards, local
from thinwire.tomlfile import validate
from thinwire.traffic import Transfer
from thinwire.workload import Workload

KINDS: Mapping[str, type[BaseModel]] = {
    "diloco": kinds.DiLoCo,
    "streaming": kinds.Streaming,
    "sparseloco": kinds.SparseLoCo,
    "muloco": kinds.MuLoCo,
    "local_sgd": kinds.LocalSGD,
    "noloco": kinds.NoLoCo,
}

OF_THE_LOOP = ("accumulate", "bucket_bytes", "every_inside")
"""Keys of [sync] about what happens within a replica, which is here the user's own loop."""


class DiLoCo:
    """Replicas of `model` on the ranks of `group` (None: all ranks), brought together every `every` steps of `optimizer`.

    compress: "none", "int4", ..., or a table as in the section [compress] of run.toml, {"kind": "topk", "k": 64}; None: as the
    kind has it, top-k for sparseloco and "none" for the others. options: as in [sync]: first, outer_learning_rate,
    outer_momentum, layers_per_fragment, overlap, mixing, arrival, outer_device. Where each replica is itself several ranks
    (DistributedDataParallel or `fully_shard` inside), `group` is the ranks with the same place in their replicas, as a process
    group or a mesh of one axis; `model` may be the wrapped one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 30,
        kind: str = "diloco",
        compress: str | Mapping[str, Any] | None = None,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        **options: Any,
    ) -> None:
        if not dist.is_initialized():
            raise UserError('DiLoCo: there is no process group; call torch.distributed.init_process_group("gloo") before')
        if kind not in KINDS:
            raise UserError(f"DiLoCo: kind = {kind!r} does not exist; there are {', '.join(KINDS)}")
        for option in OF_THE_LOOP:
            if option in options:
                raise UserError(f"DiLoCo: {option} is about what happens within a replica, which is your own loop; leave it out")
        self.ledger = Ledger()
        self._kind = kind
        self._model, self._optimizer = model, optimizer
        self._group = _process_group(group)
        _check_parameters(shards := Shards(model), self._group)
        shards.check_group(self._group)
        self._layout = Layout(outer=self._group.size())
        self._sync = make_synchroniser(
            validate(KINDS[kind], {"every": every, **options}, "DiLoCo"),  # type: ignore[arg-type]
            _coding(kind, compress),
            self._layout,
            self.ledger,
        )
        self._backend = ""
        self._goes_on = self._entered = False
        """_goes_on: replicas are where they were, and may differ."""
        self._steps = 0
        self._open = ExitStack()

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent so far, by the ledger."""
        return self.ledger.sent_bytes

    @property
    def steps(self) -> int:
        """Steps of the inner optimizer, with those before a resume."""
        return self._steps

    def __enter__(self) -> "DiLoCo":
        """Collective over all ranks of the default group, also where replicas lie along sub-groups."""
        hooks = self._optimizer._optimizer_step_post_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), DiLoCo) for hook in hooks):
            raise UserError("DiLoCo: another one is at work on this optimizer; leave its with block first")
        with ExitStack() as stack:
            with self.ledger.label("replica set-up"):
                shards = Shards(self._model)
                shards.check_same_everywhere(self._group)
                group = self._own_group(shards.device)
                stack.callback(release, group, self.ledger)
                if not self._goes_on:
                    make_same({**shards, **{name: local(one) for name, one in self._model.named_buffers()}}, group)
            mesh = DeviceMesh.from_group(group, shards.device.type, mesh_dim_names=(OUTER,))
            stack.enter_context(self._sync.attached(self._model, self._optimizer, mesh))
            stack.callback(self._optimizer.register_step_post_hook(self._after_step).remove)
            self._open = stack.pop_all()
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """The last exchange; after an exception nothing is sent any more, and the model stays as it is."""
        self._entered, self._goes_on = False, True
        with self._open:
            if error is None:
                self._sync.finish()
                shards = Shards(self._model)
                with self._sync.averaged():
                    averaged = {name: values.clone() for name, values in shards.items()}
                shards.write(averaged)
                self._goes_on = False

    def traffic(self, workload: Workload) -> list[Transfer]:
        """What this rank will send, of its shards under FSDP2; `workload` has the whole shapes. Dtypes are the model's. No
        communication."""
        shards = Shards(self._model)
        frozen = shards.keys() - shards.trained()
        parameters = [parameter for parameter in workload.parameters if parameter.name not in frozen]
        missing = [parameter.name for parameter in parameters if parameter.name not in shards]
        if missing and shards.cut():
            raise UserError(f"DiLoCo: the model has no parameter {missing[0]!r}; name them as model.named_parameters() does")
        for index, parameter in enumerate(parameters):
            if parameter.name in shards:
                held = shards.described(parameter.name)
                parameters[index] = replace(parameter, shape=held.shape, dtype=held.dtype)
        return self._sync.traffic(replace(workload, parameters=tuple(parameters)), self._layout)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds the parameters that count, alike on all replicas (noloco: this replica's slow ones). Local."""
        return self._sync.averaged()

    def state_dict(self) -> dict[str, Any]:
        """What this rank carries besides its model and optimizer: save all three with torch.save, on every rank.

        torch.distributed.checkpoint takes shards of the same name and place for copies, and would keep those of one replica.
        """
        return {"kind": self._kind, "replicas": self._group.size(), "steps": self._steps, "sync": self._sync.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before `with`; used once. Load this rank's own model and optimizer too: nothing is broadcast then.

        UserError for the state of another kind, or of one of more or fewer replicas (`adopt` takes those of all).
        """
        self._check_state(state)
        if (replicas := state.get("replicas", self._group.size())) != self._group.size():
            raise UserError(
                f"DiLoCo: the state is of one of {replicas} replicas, and there are {self._group.size()}: what the others carry "
                "would be lost; hand the states of all of them to adopt()"
            )
        self._sync.load_state_dict(state["sync"])
        self._steps, self._goes_on = state["steps"], True

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Instead of load_state_dict: the states of all replicas of a run that had more or fewer, the same on every rank.

        Before `with`; all replicas then begin from the parameters that count, whatever their models hold. Optimizers are the
        user's to load. UserError as for load_state_dict.
        """
        for state in states:
            self._check_state(state)
        if not states or any(state.get("replicas", len(states)) != len(states) for state in states):
            raise UserError(f"DiLoCo: adopt() wants the states of all replicas of a run, and has {len(states)}")
        self._sync.adopt([state["sync"] for state in states])
        self._steps, self._goes_on = states[0]["steps"], True

    def _check_state(self, state: dict[str, Any]) -> None:
        if self._entered:
            raise UserError("DiLoCo: load its state before the with block, not inside")
        if (kind := state.get("kind", self._kind)) != self._kind:
            raise UserError(f"DiLoCo: the state is of kind = {kind!r}, and this one is {self._kind!r}; make it of the same kind")

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ledger.step = self._steps
        self._sync.after_step(self._steps)
        self._steps += 1

    def _own_group(self, device: torch.device) -> dist.ProcessGroup:
        """The same ranks. For CPUs behind a meter that writes into our own ledger: a backend by a name that nobody else has. On a
        device on the user's backends, and whoever calls enters it."""
        if device.type != "cpu":
            return private_copy(self._group, f"mesh_{OUTER}")
        if not self._backend:
            self._backend = f"{backend.NAME}-{OUTER}-{len(dist.Backend.backend_list)}"
            backend.register(self.ledger, self._backend)
        return private_copy(self._group, f"mesh_{OUTER}", self._backend)


def _coding(kind: str, compress: str | Mapping[str, Any] | None) -> NoCompression | Coded:
    if compress is None:
        return SPARSELOCO if kind == "sparseloco" else NoCompression()
    return read_coding(compress, "DiLoCo: compress")


def _process_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise UserError(
                f"DiLoCo: group is a mesh of {group.ndim} axes, {group.mesh_dim_names}; hand over the one along which replicas "
                'lie: group=mesh["outer"]'
            )
        return group.get_group()
    chosen = group if group is not None else dist.group.WORLD
    assert chosen is not None, "there is a default group"
    return chosen


def _check_parameters(shards: Shards, group: dist.ProcessGroup) -> None:
    device = shards.device
    for name, held in shards.items():
        if held.device != device:
            raise UserError(f"DiLoCo: {name} is on {held.device}, and the first parameter on {device}; move all to one device")
    if device.type != "cpu" and backend_of(group, device.type) is None:
        served = dist.get_backend_config(group)
        raise UserError(
            f"DiLoCo: parameters are on {device}, and the group serves {served}; make one that serves it, such as "
            'init_process_group("cpu:gloo,cuda:nccl")'
        )
    for name in shards.trained():
        shards.described(name)
