"""The subcommands of `v4jax`, and what both command lines share."""
