"""Synchronisers: when replicas exchange what, over one axis of the mesh."""
