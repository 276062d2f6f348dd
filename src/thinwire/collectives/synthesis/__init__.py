"""Schedules made from the network itself: exact optima, trees that reach them, lower bounds. No torch, no licensed solver."""
