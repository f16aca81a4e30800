"""Text: the chat encoding, tokenizers, stop strings. No JAX."""
