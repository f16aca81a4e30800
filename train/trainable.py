"""Splitting a model into what a run trains and what it leaves unchanged.

The trained part is a flat dictionary from a weight's dotted name to the weight itself, or to an
adapter's two factors. Routers' biases, which a separate rule updates, are another. The rest of the
model is frozen: no gradient, no decay, no copy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import quantize
from v4jax.adapters import lora
from v4jax.adapters.lora_settings import Lora
from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec
from v4jax.model.transformer import Model

from . import optimizer
from .full_settings import Full

Trained = dict[str, Any]


class Parts(NamedTuple):
    """A split model: weights updated by gradients, biases updated by a rule, frozen weights."""

    trained: Trained
    balanced: dict[str, Any]
    frozen: Any


def declare(cfg: ModelConfig, what: Full | Lora) -> dict[str, Any]:
    """Declarations of the trained part, in its structure."""
    if isinstance(what, Lora):
        return lora.declare(cfg, what)
    return {name: spec for name, spec in params.leaves(Model(cfg)) if _chooses(what, name, spec)}


def _chooses(full: Full, name: str, spec: ParamSpec) -> bool:
    """Whether full training trains a weight."""
    if optimizer.group(name, spec) in ("fixed", "balanced"):
        return False
    return (full.mtp or not name.startswith("mtp.")) and (full.indexers or ".indexer." not in name)


def split(model: Model, cfg: ModelConfig, what: Full | Lora, key: jax.Array) -> Parts:
    """Split a model as it is before the first step.

    Args:
      model: the model; weights are arrays or quantised.
      cfg: the model's configuration.
      what: what is trained.
      key: random key of an adapter's initial factors.

    Raises:
      ValueError: a weight to be trained is quantised.
    """
    if isinstance(what, Lora):
        return Parts(lora.init(cfg, what, key), {}, model)
    trained, balanced = {}, {}

    def take(name: str, spec: ParamSpec, weight: Any) -> Any:
        if optimizer.group(name, spec) == "balanced" and (what.mtp or not name.startswith("mtp.")):
            balanced[name] = weight
            return None
        if not _chooses(what, name, spec):
            return weight
        if not isinstance(weight, jax.Array | jax.ShapeDtypeStruct):
            raise ValueError(
                f"'{name}' is quantised and cannot be trained; load the model with"
                " keep_quantised=False, or train an adapter."
            )
        trained[name] = weight
        return None

    frozen = params.map_leaves(take, Model(cfg), model)
    return Parts(trained, balanced, frozen)


def join(parts: Parts, cfg: ModelConfig, what: Full | Lora, key: jax.Array | None = None) -> Model:
    """The complete model. `key` is for an adapter's dropout; None: no dropout."""
    if isinstance(what, Lora):
        return lora.attach(parts.frozen, cfg, what, parts.trained, key)

    def put(name: str, spec: ParamSpec, weight: Any) -> Any:
        if name in parts.balanced:
            return parts.balanced[name]
        return _compute_form(parts.trained[name], spec, what) if name in parts.trained else weight

    return params.map_leaves(put, Model(cfg), parts.frozen)


def _compute_form(weight: Any, spec: ParamSpec, what: Full) -> Any:
    """A trained weight in the form in which the model computes with it."""
    if what.fp4_experts and spec.stored == "expert":
        weight = quantize.fake_quant_fp4(weight, block=32)
    keeps_dtype = what.dtype is None or spec.stored == "f32"
    return weight if keeps_dtype else weight.astype(jnp.dtype(what.dtype))
