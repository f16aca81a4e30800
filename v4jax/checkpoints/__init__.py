"""Weights on disk: formats, names, reading, writing, conversion."""
