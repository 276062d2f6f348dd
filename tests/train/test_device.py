"""On which device a rank trains and what carries its tensors, by what this machine has: not yet run on a GPU."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from thinwire.collectives.ledger import Ledger
from thinwire.config.run import RunConfig
from thinwire.environment import Environment, Lab, Place
from thinwire.errors import UserError
from thinwire.train import setup
from thinwire.train.worker import _device


def environment(rank: int, lab: bool) -> Environment:
    """Of a rank of four that is the only one on its host."""
    place = Place(rank=rank, world_size=4, local_rank=0, local_size=1, master_address="a", master_port=1)
    there = Lab(cluster="/c.toml", host="host1", paced=False, delay="none", results="/r") if lab else None  # type: ignore[arg-type]
    return Environment(place=place, lab=there, error_file=None, cache_folder="/", results=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("lab", [True, False])
@pytest.mark.parametrize("nccl", [True, False])
def test_with_gpus(lab: bool, nccl: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A lab's hosts share this machine's; others have their own. Without NCCL gloo copies to the host, and that is said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    found = [_device(environment(rank, lab)) for rank in range(4)]
    assert [device.index for device, _ in found] == ([0, 1, 0, 1] if lab else [0] * 4)
    assert {carrier for _, carrier in found} == {f"cpu:gloo,cuda:{'nccl' if nccl else 'gloo'}"}
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "share" in line] == (["4 ranks share 2 GPUs"] if lab else [])
    assert [line for line in lines if "gloo" in line] == (
        [] if nccl else ["the ranks talk over gloo, through pinned memory of the host: this torch has no NCCL"]
    )


@pytest.mark.parametrize("nccl", [True, False])
def test_collectives_are_chosen_over_nccl_or_refused(nccl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    if not nccl:
        with pytest.raises(UserError, match=r"^collectives.kind chooses on GPUs over NCCL, and this torch has no NCCL; set"):
            _device(environment(0, lab=True), chosen=True)
        return
    assert _device(environment(0, lab=True), chosen=True) == (torch.device("cuda", 0), "thinwire")
    registered: list[Any] = []
    monkeypatch.setattr(setup, "register_nccl", lambda *given: registered.append(given))
    config = RunConfig.model_validate({"collectives": {"kind": "measured"}})
    tuner = setup.set_collectives(config, environment(0, lab=False), ledger := Ledger(), device="cuda")
    assert tuner is not None and registered == [(ledger, tuner)]


def test_without_a_gpu_ranks_are_the_cpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _device(environment(0, lab=True)) == (torch.device("cpu"), "thinwire")
    assert capsys.readouterr().out == ""
