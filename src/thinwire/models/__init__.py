"""The things trained. A model imports torch and nothing else."""
