"""Why a script that knows nothing of us is slow on several hosts: its own steps metered, taken apart, and replayed otherwise.

trace      what a rank has noted: calls, waits, marks (plain data)
kineto     traces of torch.profiler in place of our own
steps      traces of all ranks -> the mean step: each rank's program, each call's seconds on the wire
replay     how long a step is whose programs or calls are others
prices     what calls would take on another network, in another order, in other codes
causes     what each possible cause costs, by replay without it; the one that is named
remedies   what to do, the predicted step of each, and the line of code that does it
text       all of that in words
meter, hooks, clocks, session      inside the script's processes (the only files here that import torch)
"""
