"""The planner: what a step will cost, before it is run."""
