"""Who started this process: each launcher's variables."""

import json
import os
from pathlib import Path

import pytest

from thinwire.environment import Place, read_environment, set_variables, shared_gpu_variables
from thinwire.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "THINWIRE_LAB")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


def place_of(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Place | None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return read_environment().place


def test_alone() -> None:
    assert read_environment().place is None


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of(monkeypatch, RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="10.1.2.3", MASTER_PORT="1234")
    assert place == Place(rank=3, world_size=8, local_rank=1, master_address="10.1.2.3", master_port=1234)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node07", "node07"), ("node[07-09,12]", "node07"), ("a,b[1-2]", "a"), ("gpu[3,5]", "gpu3")],
)
def test_srun(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    variables = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}
    place = place_of(monkeypatch, SLURM_STEP_NODELIST=nodes, **variables)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.master_address) == (5, 6, 2, first)


def test_a_shell_inside_a_slurm_allocation_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of(monkeypatch, SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_LOCALID="0") is None


def test_mpiexec(monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of(monkeypatch, PMI_RANK="1", PMI_SIZE="4", MPI_LOCALRANKID="1")
    assert place is not None and (place.rank, place.world_size, place.master_address) == (1, 4, "127.0.0.1")
    assert place.by_mpiexec
    monkeypatch.delenv("PMI_RANK")
    ompi = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    place = place_of(monkeypatch, **ompi)
    assert place is not None and (place.rank, place.world_size) == (2, 4) and place.by_mpiexec


def test_a_broken_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="RANK='three' is not a number"):
        place_of(monkeypatch, RANK="three", WORLD_SIZE="4")


def test_the_lab_tells_where_a_process_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = {"cluster": "/c.toml", "host": "host1", "paced": True, "delay": "none", "results": "/results"}
    (tmp_path / "lab.json").write_text(json.dumps(told))
    monkeypatch.setenv("THINWIRE_LAB", str(tmp_path / "lab.json"))
    found = read_environment()
    assert found.lab is not None and found.lab.host == "host1" and found.lab.paced and found.results == Path("/results")
    (tmp_path / "lab.json").write_text("{}")
    with pytest.raises(UserError, match="THINWIRE_LAB"):
        read_environment()


def at(rank: int, world_size: int, local_rank: int, local_size: int) -> Place:
    return Place(
        rank=rank, world_size=world_size, local_rank=local_rank, local_size=local_size, master_address="a", master_port=1
    )


def test_ranks_that_share_a_gpu_are_hosts_of_their_own_to_nccl() -> None:
    """On one machine over its loopback; on two by the cards; and where each has its own, nothing is set."""
    ids = [shared_gpu_variables(at(rank, 4, rank, 4), 1, "node") for rank in range(4)]
    assert len({one["NCCL_HOSTID"] for one in ids}) == 4 and {one["NCCL_SOCKET_IFNAME"] for one in ids} == {"lo"}
    apart = [shared_gpu_variables(at(2 * host + local, 4, local, 2), 1, f"node{host}") for host in (0, 1) for local in (0, 1)]
    assert len({one["NCCL_HOSTID"] for one in apart}) == 4 and all(len(one) == 1 for one in apart)
    assert shared_gpu_variables(at(1, 4, 1, 4), 4, "node") == shared_gpu_variables(at(1, 4, 1, 4), 0, "node") == {}


def test_variables_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_HOSTID", "mine")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    set_variables({"NCCL_HOSTID": "ours", "NCCL_SOCKET_IFNAME": "lo"})
    assert (os.environ["NCCL_HOSTID"], os.environ["NCCL_SOCKET_IFNAME"]) == ("mine", "lo")


def test_all_ranks_of_a_lab_are_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert read_environment().here == (0, 1)
    assert place_of(monkeypatch, **launched) is not None and read_environment().here == (1, 2)
    told = {"cluster": "/c.toml", "host": "host2", "paced": True, "delay": "none", "results": "/results"}
    (tmp_path / "lab.json").write_text(json.dumps(told))
    monkeypatch.setenv("THINWIRE_LAB", str(tmp_path / "lab.json"))
    assert read_environment().here == (5, 8)
