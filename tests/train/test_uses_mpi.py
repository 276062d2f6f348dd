"""When training goes over MPI."""

from dataclasses import replace

import pytest
import torch

from thinwire.config.run import RunConfig
from thinwire.environment import Place
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


def test_tensors_on_cuda_are_not_carried_by_either() -> None:
    assert setup.uses_mpi("auto", replace(PLACE, by_mpiexec=True), torch.device("cuda")) is False
    with pytest.raises(UserError, match="'mpi' carries tensors of the CPU, not of cuda; set it to 'auto'"):
        setup.uses_mpi("mpi", PLACE, torch.device("cuda"))


def test_the_configuration_names_it() -> None:
    assert RunConfig().train.backend == "auto"
    with pytest.raises(ValueError, match="backend"):
        RunConfig.model_validate({"train": {"backend": "nccl"}})
