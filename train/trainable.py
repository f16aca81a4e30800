"""What a run trains, apart from what it leaves as it is.

The trained part is a flat dictionary: of a weight's dotted name the weight itself, or an adapter's
two factors. Routers' biases, which a rule of their own moves, are another. Everything else of the
model is frozen and gets no gradient, no decay and no copy.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import quantize
from v4jax.adapters import lora
from v4jax.adapters.lora import Lora
from v4jax.model import params
from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec
from v4jax.model.transformer import Model

from . import optimizer

Trained = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Full:
    """All weights but tables of expert ids and routers' biases.

    Attributes:
      mtp: the MTP blocks' too, in a recipe where `losses.mtp` gives them a gradient.
      indexers: the sparse attention's indexers too: without a loss of their own they get no
        gradient, and decay alone would move them.
      dtype: in which they are computed with; None: that in which they are held.
      fp4_experts: compute with the routed experts as FP4 holds them; gradients pass straight
        through the rounding.
    """

    mtp: bool = True
    indexers: bool = False
    dtype: str | None = None
    fp4_experts: bool = False

    def chooses(self, name: str, spec: ParamSpec) -> bool:
        """Whether a weight is trained."""
        if optimizer.group(name, spec) in ("fixed", "balanced"):
            return False
        return (self.mtp or not name.startswith("mtp.")) and (
            self.indexers or ".indexer." not in name
        )


class Parts(NamedTuple):
    """A model taken apart: what gradients move, what a rule moves, what nothing moves."""

    trained: Trained
    balanced: dict[str, Any]
    frozen: Any


def declare(cfg: ModelConfig, what: Full | Lora) -> dict[str, Any]:
    """The trained part's declarations, in its structure."""
    if isinstance(what, Lora):
        return lora.declare(cfg, what)
    return {name: spec for name, spec in params.leaves(Model(cfg)) if what.chooses(name, spec)}


def split(model: Model, cfg: ModelConfig, what: Full | Lora, key: jax.Array) -> Parts:
    """Take a model apart as it is before the first step.

    Args:
      model: its weights, arrays or quantised.
      cfg: its configuration.
      what: is trained.
      key: from which an adapter's beginning follows.

    Raises:
      ValueError: a weight is to be trained and is quantised.
    """
    if isinstance(what, Lora):
        return Parts(lora.init(cfg, what, key), {}, model)
    trained, balanced = {}, {}

    def take(name: str, spec: ParamSpec, weight: Any) -> Any:
        if optimizer.group(name, spec) == "balanced" and (what.mtp or not name.startswith("mtp.")):
            balanced[name] = weight
            return None
        if not what.chooses(name, spec):
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
    """The whole model. `key` is for an adapter's dropout; None: there is none."""
    if isinstance(what, Lora):
        return lora.attach(parts.frozen, cfg, what, parts.trained, key)

    def put(name: str, spec: ParamSpec, weight: Any) -> Any:
        if name in parts.balanced:
            return parts.balanced[name]
        return _computed(parts.trained[name], spec, what) if name in parts.trained else weight

    return params.map_leaves(put, Model(cfg), parts.frozen)


def _computed(weight: Any, spec: ParamSpec, what: Full) -> Any:
    """A trained weight as the model computes with it."""
    if what.fp4_experts and spec.stored == "expert":
        weight = quantize.fake_quant_fp4(weight, block=32)
    wide = what.dtype is None or spec.stored == "f32"
    return weight if wide else weight.astype(jnp.dtype(what.dtype))
