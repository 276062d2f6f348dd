"""The probe: links, cards, shared uplinks and compute rates as they are, written down as a cluster file."""
