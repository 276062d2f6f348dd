"""What Horovod's API stands on, whatever the framework: ranks that agree by name on what to run, and run it in one order.

request       what a rank asks for, and whether all ask for the same
controller    rank 0's table: which requests are complete, which can never be
engine        the threads of a rank: what is asked for goes to rank 0, what is announced is run
members       process sets, and the groups in which their calls run
collectives   an announcement on tensors; `adasum` among them
context       the state of a process: init, rank, size, shutdown
timeline      the trace of rank 0 for chrome://tracing
"""
