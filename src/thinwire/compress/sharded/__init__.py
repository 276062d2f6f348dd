"""Compression inside FSDP2: gradients reduce-scattered and weights all-gathered in codes."""
