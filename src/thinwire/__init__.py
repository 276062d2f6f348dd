"""thinwire: train language models over networks that are too slow for it."""

__version__ = "0.1.0"
