"""Models cut into parts for several ranks, from outside: stages of a pipeline."""
