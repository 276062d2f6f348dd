"""torch.distributed over MPI, with PyTorch as it comes from PyPI: a c10d process group written in Python over mpi4py.

    library    find MPI, start it, end it
    engine     the thread that makes every exchange progress, and the Work that a caller waits for
    buffers    tensors as MPI sees them: bytes, counts, datatypes, reduction operations
    agreement  before data moves the ranks of a group compare what they are about to do
    group      the process group: c10d's calls as MPI's
    start      the whole of it for a program that mpiexec has started

    mpiexec -n 4 python program.py, where the program says:

        from thinwire.collectives.mpi.start import process_group

        with process_group():
            model = DistributedDataParallel(model)      # and whatever else talks through torch.distributed

or `thinwire.init(inner="mpi")`, with collectives chosen for the network.

mpi4py and an MPI library are the extra `mpi`. Nothing here starts MPI before it is asked to.
"""
