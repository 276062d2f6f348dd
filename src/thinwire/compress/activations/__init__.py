"""What crosses pipeline boundaries and tensor-parallel groups, in codes."""
