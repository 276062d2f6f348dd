"""Training over MPI: when, and where the ranks meet."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import torch

from thinwire.collectives.mpi.start import Meeting, Mpi, started
from thinwire.errors import UserError
from thinwire.train.runtime import DEFAULT_PORT, Place


def over_mpi(wanted: str, place: Place, device: torch.device) -> bool:
    """Do the exchanges of this run go over MPI? wanted: train.backend."""
    if wanted != "auto" and device.type != "cpu":
        raise UserError(f"train.backend = {wanted!r} carries tensors of the CPU, not of {device.type}; set it to 'auto'")
    if wanted != "auto" or device.type != "cpu" or not place.by_mpiexec:
        return wanted == "mpi"
    if find_spec("mpi4py") is not None:
        return True
    if place.rank == 0:
        print("thinwire: the ranks talk over gloo: mpi4py is not installed (the extra `mpi`)", file=sys.stderr, flush=True)
    return False


@contextmanager
def mpi_ranks(place: Place, timeout_s: float) -> Iterator[tuple[Place, Mpi]]:
    """MPI, started; the place with an address that all ranks have heard. Collective."""
    with started(timeout_s) as mpi:
        mpi.check_place(place.rank, place.world_size)
        wanted = Meeting(place.master_address, place.master_port if place.master_port != DEFAULT_PORT else 0)
        meeting = mpi.meet(wanted, timeout_s)
        if place.rank == 0:
            print(f"{place.world_size} ranks over {mpi.library.version}", flush=True)
        yield replace(place, master_address=meeting.address, master_port=meeting.port), mpi
