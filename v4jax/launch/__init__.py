"""Files that launchers take: what `v4jax launch` prints for a recipe and a topology."""
