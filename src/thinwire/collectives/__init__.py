"""Collectives: what a call costs, how it is run, and what was really sent.

wire, price             bytes and seconds of a call, for predictions
ledger, backend         what was sent; the metered c10d backend and our own calls
schedules, synthesis    who sends which chunk to whom, proven right; the best there can be on a network, and lower bounds
choose                  candidates for a call, simulated on a cluster
run                     a schedule on tensors, over send and receive
tuned, scheduled, start the choice measured on the ranks; the backend that makes it; `thinwire.init`
mpi, nccl               the backend over MPI; over NCCL
nccl_csv                the file of NCCL's tuner plugin
"""
