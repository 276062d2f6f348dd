"""Codecs: values to bytes and back, each with its mathematics, its error bound and its paper."""
