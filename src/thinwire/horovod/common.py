"""What the doors have alike, whatever their tensors are: it is that of `thinwire.horovod.torch`."""

import thinwire.horovod.torch as _door

init, shutdown, is_initialized, ledger = _door.init, _door.shutdown, _door.is_initialized, _door.ledger
size, rank, local_size, local_rank = _door.size, _door.rank, _door.local_size, _door.local_rank
cross_size, cross_rank, is_homogeneous = _door.cross_size, _door.cross_rank, _door.is_homogeneous
ProcessSet, global_process_set = _door.ProcessSet, _door.global_process_set
add_process_set, remove_process_set = _door.add_process_set, _door.remove_process_set
start_timeline, stop_timeline = _door.start_timeline, _door.stop_timeline
gloo_built, gloo_enabled, nccl_built = _door.gloo_built, _door.gloo_enabled, _door.nccl_built
mpi_built, mpi_enabled, mpi_threads_supported = _door.mpi_built, _door.mpi_enabled, _door.mpi_threads_supported
ccl_built, ddl_built, cuda_built, rocm_built = _door.ccl_built, _door.ddl_built, _door.cuda_built, _door.rocm_built
ReduceOp, Average, Sum, Adasum = _door.ReduceOp, _door.Average, _door.Sum, _door.Adasum
Min, Max, Product = _door.Min, _door.Max, _door.Product
Compression, HorovodInternalError = _door.Compression, _door.HorovodInternalError
barrier, join, broadcast_object, allgather_object = _door.barrier, _door.join, _door.broadcast_object, _door.allgather_object
