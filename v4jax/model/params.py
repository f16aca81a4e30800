"""Each weight is declared once: its shape, logical axes, stored format and initialiser.

Modules are built with `ParamSpec` leaves by `Declare`; `abstract`, `init`, shardings and the
converter map over that one tree. Matrices are [out, in], as in the checkpoint.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import quantize
from v4jax.model.config import ExpertDtype

Stored = Literal["bf16", "f32", "fp8", "expert", "i64"]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One weight, as the release stores it.

    Attributes:
      shape: logical shape: stack dims (layers, experts) first, then [out, in].
      axes: logical axis of each dim; `sharding.RULES` maps them to mesh axes.
      stored: bf16 and f32 as named; fp8: E4M3 in 128x128 blocks; expert: the configuration's
        `expert_dtype`; i64: a table of integers. f32 and i64 keep their precision whatever the
        model's dtype.
      init: how `init` fills it: 'normal' with standard deviation `scale`, 'constant' with `scale`,
        or 'experts' with distinct ids below `scale` in each row.
      scale: see `init`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stored: Stored = "bf16"
    init: Literal["normal", "constant", "experts"] = "normal"
    scale: float = 0.02

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), f"{self.shape} has axes {self.axes}"

    @property
    def stack_dims(self) -> int:
        """Leading dims that the checkpoint stores as separate tensors."""
        return sum(axis in ("layers", "experts") for axis in self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Declare:
    """Creates the `nnx.Param`s of a module, stacked over `repeats` layers (None: not stacked)."""

    def __init__(self, repeats: int | None = None, std: float = 0.02) -> None:
        self._repeats, self._std = repeats, std

    def __call__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        stored: Stored = "bf16",
        *,
        constant: float | None = None,
    ) -> nnx.Param:
        """Declare one weight; with `constant`, `init` fills it with that number."""
        kind, scale = ("normal", self._std) if constant is None else ("constant", constant)
        return self._param(ParamSpec(shape, axes, stored, kind, scale))

    def expert_ids(self, shape: tuple[int, int], experts: int) -> nnx.Param:
        """A table whose rows are distinct expert ids."""
        return self._param(ParamSpec(shape, (None, None), "i64", "experts", float(experts)))

    def _param(self, spec: ParamSpec) -> nnx.Param:
        if self._repeats is not None:
            spec = dataclasses.replace(
                spec, shape=(self._repeats, *spec.shape), axes=("layers", *spec.axes)
            )
        return nnx.Param(spec, axes=spec.axes)


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Each weight's dotted name and value: a ParamSpec, an array or a quantised weight."""
    is_param = lambda node: isinstance(node, nnx.Variable)
    for path, param in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_param)[0]:
        yield path_name(path), param.get_value()


def path_name(path: tuple[Any, ...]) -> str:
    """'stacks.0.blocks.1.attention.q_a_RD' from a key path of the module tree."""
    parts = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path
    ]
    return ".".join(part for part in parts if part != "value")


def map_leaves(function: Callable[..., Any], declared: Tree, *others: Any) -> Tree:
    """Replace each ParamSpec of `declared` by `function(name, spec, *values in others)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, spec, *values: function(path_name(path), spec, *values),
        declared,
        *others,
        is_leaf=lambda node: isinstance(node, ParamSpec),
    )


def leaf_struct(spec: ParamSpec, dtype: Any, expert_format: ExpertDtype | None = None) -> Any:
    """The leaf that holds this weight, as ShapeDtypeStructs.

    Args:
      spec: the declaration.
      dtype: dtype of everything that need not be float32 or integer.
      expert_format: format of quantised experts; FP8 weights stay quantised too. None: nothing is
        quantised.
    """
    if spec.stored == "i64":
        return jax.ShapeDtypeStruct(spec.shape, jnp.int32)
    if spec.stored == "f32":
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32)
    stored = expert_format if spec.stored == "expert" else spec.stored
    if expert_format is not None and stored in ("fp8", "fp4"):
        return _quantized_struct(spec.shape, stored)
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype))


def _quantized_struct(shape: tuple[int, ...], stored: str) -> Any:
    *stack, n, k = shape
    scale = lambda rows, cols: jax.ShapeDtypeStruct((*stack, rows, cols), jnp.float8_e8m0fnu)
    if stored == "fp4":
        codes = jax.ShapeDtypeStruct((*stack, k // 2, n), jnp.uint8)
        return quantize.Fp4Weight(codes=codes, scale=scale(k // 32, n))
    codes = jax.ShapeDtypeStruct((*stack, k, n), jnp.float8_e4m3fn)
    return quantize.Fp8Weight(codes=codes, scale=scale(-(-k // 128), -(-n // 128)))


def abstract(declared: Tree, dtype: Any, expert_format: ExpertDtype | None = None) -> Tree:
    """The tree with ShapeDtypeStructs: enough to trace, lower and compile without weights."""
    return map_leaves(lambda _, spec: leaf_struct(spec, dtype, expert_format), declared)


def init(declared: Tree, key: jax.Array, dtype: Any) -> Tree:
    """Random weights in `dtype`. Each weight's values depend only on the key and its name."""

    def fill(name: str, spec: ParamSpec) -> jax.Array:
        struct = leaf_struct(spec, dtype)
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if spec.init == "constant":
            return jnp.full(struct.shape, spec.scale, struct.dtype)
        if spec.init == "experts":
            return _distinct_ids(leaf_key, struct.shape, int(spec.scale))
        return (jax.random.normal(leaf_key, struct.shape, jnp.float32) * spec.scale).astype(
            struct.dtype
        )

    return map_leaves(fill, declared)


def _distinct_ids(key: jax.Array, shape: tuple[int, ...], experts: int) -> jax.Array:
    noise = jax.random.uniform(key, (*shape[:-1], experts))
    return jax.lax.top_k(noise, shape[-1])[1].astype(jnp.int32)


def count(declared: Any) -> int:
    """Number of declared parameters, not counting integer tables."""
    return sum(spec.size for _, spec in leaves(declared) if spec.stored != "i64")
