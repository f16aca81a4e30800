"""Low-rank adapters: their factors, created and attached.

Axis letters: r rank, N output channels, K input channels of a matrix; layers L and experts E first.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.grouped_matmul import LoraWeight
from v4jax.adapters import lora_settings
from v4jax.adapters.lora_settings import Lora
from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.layers import Dropped
from v4jax.model.params import ParamSpec
from v4jax.model.transformer import Model

Adapter = dict[str, dict[str, Any]]  # by a weight's dotted name, its factors "a" and "b"


def targets(declared: Any, lora: Lora) -> dict[str, ParamSpec]:
    """The weights that get an update, by name.

    Raises:
      ValueError: a target matches no weight of the model.
    """
    leaves = [(name, spec) for name, spec in params.leaves(declared) if not name.startswith("mtp.")]
    for target in lora_settings.names(lora):
        ends = tuple(f".{field}" for field in lora_settings.fields_of(target))
        if not any(name.endswith(ends) for name, _ in leaves):
            raise ValueError(f"targets has {target!r}, which no layer of this model has.")
    ends = tuple(f".{field}" for field in lora_settings.fields(lora))
    return {name: spec for name, spec in leaves if name.endswith(ends)}


def declare(cfg: ModelConfig, lora: Lora) -> dict[str, dict[str, ParamSpec]]:
    """Declarations of the factors: shapes and axes, in float32; `b` starts at zero."""
    declarations = {}
    for name, spec in targets(Model(cfg), lora).items():
        *stack, n, k = spec.shape
        *axes, out_axis, in_axis = spec.axes
        rank = lora.rank_of(name)
        declarations[name] = {
            "a": ParamSpec((*stack, rank, k), (*axes, None, in_axis), "f32", scale=k**-0.5),
            "b": ParamSpec((*stack, n, rank), (*axes, out_axis, None), "f32", "constant", 0.0),
        }
    return declarations


def init(cfg: ModelConfig, lora: Lora, key: jax.Array) -> Adapter:
    """Initial factors in float32, with no effect yet. Values depend only on the key and names."""

    def fill(name: str, spec: ParamSpec) -> Array:
        if spec.init == "constant":
            return jnp.zeros(spec.shape, jnp.float32)
        name_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        # torch's default bound for linear layers, so learning rates found elsewhere carry over.
        bound = spec.scale
        return jax.random.uniform(name_key, spec.shape, jnp.float32, -bound, bound)

    return {
        name: {part: fill(f"{name}.{part}", spec) for part, spec in factors.items()}
        for name, factors in declare(cfg, lora).items()
    }


def attach(
    model: Model, cfg: ModelConfig, lora: Lora, adapter: Adapter, key: jax.Array | None = None
) -> Model:
    """The model with the adapter's updates; it shares all arrays with its inputs.

    Args:
      model: the base model; its matrices are arrays or quantised.
      cfg: the model's configuration.
      lora: the adapter's settings.
      adapter: the factors.
      key: random key for dropout; None: no dropout.

    Raises:
      ValueError: the adapter does not match the model and the settings.
    """
    shapes = lambda tree: {
        name: {part: tuple(x.shape) for part, x in factors.items()}
        for name, factors in tree.items()
    }
    given, expected = shapes(adapter), shapes(declare(cfg, lora))
    if wrong := sorted(n for n in given.keys() | expected if given.get(n) != expected.get(n)):
        raise ValueError(
            f"The adapter does not match the model and targets {lora.targets!r}, rank {lora.rank}:"
            f" {len(wrong)} weights differ, the first is '{wrong[0]}'."
        )

    def updated(name: str, _: ParamSpec, weight: Any) -> Any:
        if name not in adapter:
            return weight
        a, b = (adapter[name][part] for part in "ab")
        if lora.dropout and key is not None:
            name_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            keys = jax.random.key_data(jax.random.split(name_key, a.shape[:-2]))
            a = Dropped(a, keys, lora.dropout)
        return LoraWeight(weight, a, b, lora.scale_of(name))

    return params.map_leaves(updated, Model(cfg), model)
