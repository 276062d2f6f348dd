"""When training goes over MPI."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from thinwire.collectives.ledger import Ledger
from thinwire.config.run import RunConfig
from thinwire.environment import Environment, Place
from thinwire.errors import UserError
from thinwire.train import setup

PLACE = Place(rank=0, world_size=2, local_rank=0, master_address="127.0.0.1", master_port=29577)
CPU = torch.device("cpu")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("by_mpiexec", [True, False])
@pytest.mark.parametrize("wanted", ["auto", "gloo", "mpi"])
def test_auto_is_mpi_where_mpiexec_started_the_ranks_and_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: str, by_mpiexec: bool, installed: bool
) -> None:
    monkeypatch.setattr(setup, "find_spec", lambda name: object() if installed and name == "mpi4py" else None)
    expected = wanted == "mpi" or (wanted == "auto" and by_mpiexec and installed)
    assert setup.uses_mpi(wanted, replace(PLACE, by_mpiexec=by_mpiexec), CPU) is expected
    said = capsys.readouterr().err
    assert ("mpi4py is not installed" in said) == (wanted == "auto" and by_mpiexec and not installed)


def test_tensors_of_a_device_go_over_mpi_only_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.uses_mpi("auto", replace(PLACE, by_mpiexec=True), torch.device("cuda")) is False
    assert setup.uses_mpi("mpi", PLACE, torch.device("cuda")) is True
    assert capsys.readouterr().out == "the ranks talk over MPI, through pinned memory of the host\n"


def test_devices_are_registered_with_mpi_and_choose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not yet run on a GPU."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setup, "register", lambda ledger, **more: given.update(more))
    mpi = SimpleNamespace(inner=object())
    place = Environment(place=PLACE, lab=None, error_file=None, cache_folder=Path(), results=None)
    assert setup.set_collectives(RunConfig(), place, Ledger(), mpi, device="cuda") is None
    assert given == {"inner": mpi.inner, "devices": ("cpu", "cuda")}
    chosen = RunConfig.model_validate({"collectives": {"kind": "measured"}})
    with pytest.raises(UserError, match="'measured' is for CPUs, and for GPUs over NCCL; over MPI set it to 'native'"):
        setup.set_collectives(chosen, place, Ledger(), mpi, device="cuda")


def test_the_configuration_names_it() -> None:
    assert RunConfig().train.backend == "auto"
    with pytest.raises(ValueError, match="backend"):
        RunConfig.model_validate({"train": {"backend": "nccl"}})
