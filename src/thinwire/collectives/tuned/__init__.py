"""The collectives of a group: chosen by price, measured in turns on its ranks, kept if they are faster than the backend's own."""
