"""Kernels: they know arrays, not models."""
