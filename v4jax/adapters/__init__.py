"""Adapters and training runs: applied to a model, merged and exported."""
