"""Horovod's API for PyTorch: `import thinwire.horovod.torch as hvd`, and nothing else in the script changes.

The ranks are those that torchrun, srun, mpiexec or `thinwire horovodrun` have started. Calls run over thinwire's metered group:
what they send is in its ledger, and collectives that were chosen for the network are used. docs/horovod.md says what there is.
"""

from thinwire.adapters.horovod.context import CONTEXT
from thinwire.horovod.torch import elastic as elastic
from thinwire.horovod.torch import mpi_ops as mpi_ops
from thinwire.horovod.torch.compression import Compression as Compression
from thinwire.horovod.torch.functions import allgather_object as allgather_object
from thinwire.horovod.torch.functions import broadcast_object as broadcast_object
from thinwire.horovod.torch.functions import broadcast_optimizer_state as broadcast_optimizer_state
from thinwire.horovod.torch.functions import broadcast_parameters as broadcast_parameters
from thinwire.horovod.torch.mpi_ops import *  # noqa: F403 - all of it
from thinwire.horovod.torch.optimizer import DistributedOptimizer as DistributedOptimizer
from thinwire.horovod.torch.sync_batch_norm import SyncBatchNorm as SyncBatchNorm

init, shutdown, is_initialized = CONTEXT.init, CONTEXT.shutdown, CONTEXT.is_initialized
size, rank, local_size, local_rank = CONTEXT.size, CONTEXT.rank, CONTEXT.local_size, CONTEXT.local_rank
cross_size, cross_rank, is_homogeneous = CONTEXT.cross_size, CONTEXT.cross_rank, CONTEXT.is_homogeneous
add_process_set, remove_process_set = CONTEXT.add_process_set, CONTEXT.remove_process_set
start_timeline, stop_timeline, ledger = CONTEXT.start_timeline, CONTEXT.stop_timeline, CONTEXT.ledger


def gloo_built() -> bool:
    """Whether calls may run over gloo: they do, unless `thinwire.init(inner=...)` said otherwise before."""
    return True


def mpi_built() -> bool:
    """Nothing is built for MPI; ranks over it come from `thinwire.init(inner="mpi")`."""
    return False


def nccl_built() -> int:
    """Nothing is built for NCCL: tensors of devices go through the host."""
    return 0


gloo_enabled, mpi_enabled, mpi_threads_supported = gloo_built, mpi_built, mpi_built
ccl_built, ddl_built, cuda_built, rocm_built = mpi_built, mpi_built, mpi_built, mpi_built
