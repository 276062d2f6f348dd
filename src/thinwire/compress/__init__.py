"""Fewer bits per value: codecs, what they leave behind, and how their payloads travel."""
