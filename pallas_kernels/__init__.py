"""Kernels of DeepSeek-V4: they know arrays, not models."""

from pallas_kernels.choice_log import Choice, choices, clear_choices

__all__ = ["Choice", "choices", "clear_choices"]
