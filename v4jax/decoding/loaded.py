"""A model in memory: its weights, and how they are run.

Axis letters: B batch, T tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int

from v4jax.decoding import steps
from v4jax.model import cache as caches
from v4jax.model import params, sharding
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.transformer import Model

# Logits are computed in chunks of these sizes, the last one padded, so that few programs fit all
# texts.
_CHUNKS = (64, 512, 2048)


class NotFiniteError(ValueError):
    """The model's logits are NaN or infinite, so that no token can be sampled."""

    def __init__(self) -> None:
        super().__init__(
            "The model's logits are not finite, so no token can be sampled: its weights or its "
            "adapter are damaged, or too large for the dtype. Try dtype 'float32', or download the "
            "files again."
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Loaded:
    """A model on one device or on a mesh.

    Attributes:
      weights: the weights.
      config: the configuration.
      numerics: the rounding.
      dtype: dtype of activations and cache.
    """

    weights: Model
    config: ModelConfig
    numerics: Numerics
    dtype: Any

    def __repr__(self) -> str:
        """One line instead of all weights."""
        return f"{type(self).__name__}({self._summary()})"

    def _summary(self) -> str:
        layers, parameters = len(self.config.layers), params.count(Model(self.config))
        megabytes = sum(x.nbytes for x in jax.tree.leaves(self.weights)) / 1e6
        mesh = self.mesh and {axis: n for axis, n in self.mesh.shape.items() if n > 1}
        return (
            f"{layers} layers, {parameters:,} parameters in {megabytes:,.1f} MB, computing in "
            f"{np.dtype(self.dtype).name}{f', on {mesh}' if mesh else ''}"
        )

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the weights; None if they are on one device."""
        return sharding.mesh_of(self.weights)

    @property
    def platform(self) -> str:
        """Platform of the devices: 'cpu', 'tpu' or 'gpu'."""
        return next(iter(jax.tree.leaves(self.weights)[0].devices())).platform

    def logits_of(self, rows: Sequence[Sequence[int]]) -> Float32[np.ndarray, "B T V"]:
        """Logits at every position of rows of equal length.

        Raises:
          NotFiniteError: they are not finite.
        """
        batch, length = len(rows), len(rows[0])
        groups = 1 if batch == 1 else sharding.row_groups(self.mesh)
        tokens_BT = np.zeros((-(-batch // groups) * groups, sum(_chunks(length))), np.int32)
        tokens_BT[:batch, :length] = rows
        sizes = (*tokens_BT.shape, self.dtype)
        cache, start, parts = caches.make(self.config, *sizes, mesh=self.mesh), 0, []
        static = {"cfg": self.config, "numerics": self.numerics}
        for size in _chunks(length):
            count = min(length - start, size)
            count_B = np.full(len(tokens_BT), count, np.int32)
            chunk = self.by_row(tokens_BT[:, start : start + size]), cache, self.by_row(count_B)
            with sharding.on(self.mesh):
                logits_BTV, cache = steps.logits(self.weights, *chunk, **static)
            parts.append(np.asarray(logits_BTV)[:batch, :count])
            start += size
        if not all(np.isfinite(part).all() for part in parts):
            raise NotFiniteError
        return np.concatenate(parts, axis=1)

    def by_row(self, x_B: Int[np.ndarray, "B ..."]) -> Int[Array, "B ..."]:
        """An array of the host, sharded by rows over the devices."""
        if self.mesh is None:
            return jnp.asarray(x_B)
        return jax.device_put(x_B, sharding.place(sharding.ROWS, x_B.shape, self.mesh))


def _chunks(tokens: int) -> list[int]:
    """Sizes of a text's chunks: large ones, then the smallest that fits the rest."""
    sizes = [_CHUNKS[-1]] * (tokens // _CHUNKS[-1])
    if rest := tokens - sum(sizes):
        sizes.append(next(size for size in _CHUNKS if size >= rest))
    return sizes
