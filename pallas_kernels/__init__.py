"""Kernels of DeepSeek-V4: they know arrays, not models."""
