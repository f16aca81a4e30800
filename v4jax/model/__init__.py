"""The model's mathematics and state."""
