"""mpiexec, for tests; or why there is none."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

MISSING = "" if importlib.util.find_spec("mpi4py") else "mpi4py is not installed (the extra `mpi`)"


def mpiexec() -> str:
    """The one beside this interpreter rather than another, since it must belong to the library that mpi4py finds."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec") or ""


MISSING = MISSING or ("" if mpiexec() else "there is no mpiexec; pip install mpich")


def environment() -> dict[str, str]:
    """Open MPI wants to be told that tests may run as root, and more ranks than there are cores."""
    variables = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, **variables, "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
