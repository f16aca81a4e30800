"""The mathematics of the model, and its state."""
