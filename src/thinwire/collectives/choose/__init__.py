"""Which schedule for which network: candidates, what each would take, the best first. No torch."""
