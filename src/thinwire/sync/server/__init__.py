"""Parameter servers, and workers that come and go: every server and worker has a connection of its own."""
