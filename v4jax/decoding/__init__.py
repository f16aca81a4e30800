"""Compiled steps, sampling and the loop that generates."""
