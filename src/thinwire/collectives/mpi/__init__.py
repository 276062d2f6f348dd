"""torch.distributed over MPI, with PyTorch as it comes from PyPI: a c10d process group written in Python over mpi4py.

    mpiexec -n 4 python program.py, where the program says:

        from thinwire.collectives.mpi.start import process_group

        with process_group():
            model = DistributedDataParallel(model)      # and whatever else talks through torch.distributed

or `thinwire.init(inner="mpi")`, with collectives chosen for the network.

mpi4py and an MPI library are the extra `mpi`. Nothing here starts MPI before it is asked to.
"""
