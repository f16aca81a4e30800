"""DeepSeek-V4 in JAX: the model, its checkpoints and a compiled decode loop."""
