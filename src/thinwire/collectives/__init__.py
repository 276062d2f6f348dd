"""Collectives: what each moves over which wire, what it costs, and the meter of what was really sent."""
