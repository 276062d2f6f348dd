"""Schedules run: compiled for a rank and a size, then taken step by step over any group that can send and receive."""
