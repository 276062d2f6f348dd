"""Training: ranks and their start, one step, the loop, checkpoints."""
