"""Collectives as data: who sends which part of a vector to whom, in which step; built, proven right, printed, stored."""
