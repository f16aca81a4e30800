"""Characters: the chat encoding, the tokenizer, stop strings. No JAX."""
