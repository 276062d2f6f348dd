"""Steps of parts of a model in every layout, on fake tensors of `meta`, which stands for a device: what fails here would fail or
wait on a GPU.

python fake_device_layouts.py FOLDER CASE ..
"""

import sys
from contextlib import ExitStack, nullcontext
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from small_run import config_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import schedules, stage
from torch.testing._internal.distributed.fake_pg import FakeStore

import thinwire.compress.passes
from on_device import DEVICE, FromTheDevice
from thinwire.collectives.ledger import Ledger
from thinwire.compress.passes import Found
from thinwire.layout import AXES, REPLICA_AXES, REPLICAS
from thinwire.models.transformer import Transformer
from thinwire.parallel import sequence_attention, tensor
from thinwire.sync.after_backward import AfterBackwardSync
from thinwire.sync.make import make_synchroniser
from thinwire.sync.single_rank import SingleRank
from thinwire.train.optimizers import make_optimizer
from thinwire.train.part import Place, take_part
from thinwire.train.task import LanguageModel
from thinwire.train.updates import activations_on_host

EXPERTS = {"experts": 4, "experts_per_token": 2}
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "one rank": ({}, {"train": {"optimizer": {"kind": "muon"}}}),
    "8 bits on the host": (
        {},
        {"train": {"optimizer": {"kind": "adamw", "states": "8bit"}, "on_host": ["optimizer", "activations"]}},
    ),
    "early": ({}, {"train": {"updates": "early", "clip": 0.0}, "sync": {"accumulate": 1}}),
    "tensor": ({"tensor": 2}, {"tensor": {"sums": "int8"}, "train": {"recompute": "full"}}),
    "tensor plain": ({"tensor": 2}, {"train": {"optimizer": {"kind": "sgd"}}}),
    "seq": ({"seq": 2}, {}),
    "seq x tensor": ({"seq": 2, "tensor": 2}, {}),
    "experts": ({"expert": 2}, {"model": EXPERTS}),
    "experts x data": ({"expert": 2, "data": 2}, {"model": EXPERTS, "experts": {"slots": "int8"}, "compress": {"kind": "int4"}}),
    "pipe": ({"pipe": 2}, {"train": {"recompute": "selective"}}),
    "pipe coded": ({"pipe": 2}, {"pipeline": {"activations": "int8", "gradients": "int8", "schedule": "interleaved"}}),
    "zero bubble": ({"pipe": 2}, {"pipeline": {"schedule": "zb1p"}, "model": {"tied": True}}),
    "pipe x data": ({"pipe": 2, "data": 2}, {"compress": {"kind": "int4"}, "train": {"optimizer": {"kind": "signsgd"}}}),
    "pipe x shard": ({"pipe": 2, "shard": 2}, {"model": {"dtype": "bfloat16"}}),
    "pipe x seq": ({"pipe": 2, "seq": 2}, {"pipeline": {"activations": "bf16"}}),
    "pipe x tensor": ({"pipe": 2, "tensor": 2}, {"pipeline": {"activations": "int4"}, "model": {"tied": True}}),
    "retrace": (
        {"outer": 2},
        {"sync": {"kind": "retrace", "every": 2, "first": [[2, 1]]}, "compress": {"kind": "ternary", "feedback": False}},
    ),
    "pipe x outer": (
        {"pipe": 2, "outer": 2},
        {"sync": {"kind": "diloco", "every": 2}, "compress": {"kind": "int4"}, "model": {"tied": False}},
    ),
}


def built(task: LanguageModel) -> Transformer:
    """There at once: fake parameters do not move."""
    torch.set_default_dtype(getattr(torch, task.shape.dtype))
    with DEVICE:
        return Transformer(task.shape)


def plain(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """That kind, which takes no fused kernels: these know no meta."""

    def begin(self: torch.optim.Optimizer, *arguments: Any, fused: bool = False, **options: Any) -> None:
        kind.__init__(self, *arguments, **options)  # type: ignore[misc]

    return type(kind.__name__, (kind,), {"__init__": begin})


def done(*_: Any, **__: Any) -> Any:
    """A message that is there."""
    return SimpleNamespace(wait=lambda *_: True)


def batched(ops: list[dist.P2POp]) -> list[Any]:
    assert all(op.tensor.device == DEVICE for op in ops), "what travels is on the device"
    return [done() for _ in ops]


def connected(schedule: Any, its: Any, *_: Any) -> None:
    """In place of PyTorch's first messages, in which stages agree, once, that shapes are known."""
    for one in its:
        one._inference_mode = stage.InferenceMode.STATIC


def fetched(step: int, number: int, names: list[str], spoiled: torch.Tensor, bad: torch.Tensor) -> Found:
    """What comes to the host by itself."""
    assert spoiled.device == bad.device == DEVICE
    return Found(step, number, names, False, bad, None)  # type: ignore[arg-type]


def run(folder: Path, degrees: dict[str, int], sections: dict[str, Any]) -> None:
    config = config_of(folder, degrees, **{**sections, "model": {"dtype": "float32", "layers": 2, **sections.get("model", {})}})
    layout = config.layout.resolve(prod(degrees.values()), rare=config.sync.rare)
    ranks = layout.world_size
    for rank in {0, ranks - 1}:
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        ledger = Ledger()
        mesh = init_device_mesh("cpu", layout.of_gradients.degrees, mesh_dim_names=AXES)
        groups = {name: mesh.get_group(name) for name in AXES}
        if degrees.keys() >= {"expert", "data"}:
            mesh[REPLICA_AXES]._flatten(REPLICAS)
        groups["seq"], _ = dist.new_subgroups_by_enumeration(layout.groups("seq"))
        task = LanguageModel(config, layout, folder)
        batches = [task.batch(0, micro) for micro in range(config.sync.accumulate)]
        with FakeTensorMode(allow_non_fake_inputs=True), FromTheDevice(by_itself=True):
            on_host = "activations" in config.train.on_host
            precision = partial(activations_on_host, DEVICE, nullcontext) if on_host else nullcontext
            part = take_part(task, config, Place(layout=layout, groups=groups, ledger=ledger, device=DEVICE, precision=precision))
            optimizer = make_optimizer(part.module, config.train)
            alone = config.train.updates == "early"
            sync = SingleRank() if alone else make_synchroniser(config.sync, config.compress, layout.of_gradients, ledger)
            with sync.attached(part.module, optimizer, mesh) as attached:
                stepper = part.stepper(attached, optimizer, sync, task, config.train)
                stepper.rehearse(batches[0])
                for step in range(5 if config.sync.kind == "retrace" else 2):
                    ran = stepper.run(step, batches, len(batches))
                    assert ran.loss.device == DEVICE
            assert all(parameter.device == DEVICE for parameter in part.module.parameters())
            moved = [one for its in optimizer.state.values() for one in its.values() if torch.is_tensor(one) and one.dim()]
            where = torch.device("cpu") if "optimizer" in config.train.on_host else DEVICE
            assert all(one.device == where for one in moved)
        assert ranks == 1 or ledger.sent_bytes > 0
        dist.destroy_process_group()


def main(folder: Path, cases: list[str]) -> None:
    nobody = type("Nobody", (), {})
    with ExitStack() as stack:
        for module in (sequence_attention, tensor):  # which send nothing of fake tensors
            stack.enter_context(mock.patch.object(module, "FakeTensor", nobody))
        for name, stand_in in (("batch_isend_irecv", batched), ("send", done), ("recv", done)):
            stack.enter_context(mock.patch.object(dist, name, stand_in))  # the fake group knows no messages on meta
        stack.enter_context(mock.patch.object(schedules._PipelineSchedule, "_warmup_p2p", connected, create=True))
        alone = {"private_copy": lambda group, *_: group, "release": done, "backend_of": lambda *_: "fake"}
        for name, stand_in in alone.items():
            stack.enter_context(mock.patch(f"thinwire.compress.coded.{name}", stand_in))
        thinwire.compress.passes._fetched = fetched
        for name in ("after_backward", "retrace"):
            stack.enter_context(mock.patch(f"thinwire.sync.{name}.make_same", done))  # set-up may read on the host
        for kind in (torch.optim.AdamW, torch.optim.SGD):
            stack.enter_context(mock.patch.object(torch.optim, kind.__name__, plain(kind)))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", done))  # codes are timed in set-up
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *_: False))  # meta has none
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        # the same exchange without DistributedDataParallel, which takes no such tensors (`compress/fake_device.py` is its hook)
        stack.enter_context(mock.patch("thinwire.sync.make.EveryStepSync", AfterBackwardSync))
        stack.enter_context(mock.patch.object(LanguageModel, "build_model", built))
        stack.enter_context(mock.patch.object(Transformer, "to", lambda model, device: model))
        for case in cases:
            run(folder / case.replace(" ", "-"), *CASES[case])
            print(f"{case}: all on the device", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
