"""The catalogue of tasks: each is data, a model, a loss and a score, in a file of its own."""
