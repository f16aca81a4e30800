"""What a run trains, apart from what it leaves as it is.

The trained part is a flat dictionary: of a weight's dotted name the weight itself, or an adapter's
two factors. Everything else of the model is frozen and gets no gradient, no decay and no copy.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from v4jax import lora, params
from v4jax.config import ModelConfig
from v4jax.lora import Lora
from v4jax.model import Model
from v4jax.params import ParamSpec

from . import optimizer

Trained = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Full:
    """All weights but tables of expert ids and routers' biases.

    Attributes:
      mtp: the MTP blocks' too.
      indexers: the sparse attention's indexers too: without a loss of their own they get no
        gradient, and decay alone would move them.
      dtype: in which they are computed with; None: that in which they are held.
    """

    mtp: bool = True
    indexers: bool = False
    dtype: Any = None

    def chooses(self, name: str, spec: ParamSpec) -> bool:
        """Whether a weight is trained."""
        if optimizer.group(name, spec) in ("fixed", "balanced"):
            return False
        return (self.mtp or not name.startswith("mtp.")) and (
            self.indexers or ".indexer." not in name
        )


def declare(cfg: ModelConfig, what: Full | Lora) -> dict[str, Any]:
    """The trained part's declarations, in its structure."""
    if isinstance(what, Lora):
        return lora.declare(cfg, what)
    return {name: spec for name, spec in params.leaves(Model(cfg)) if what.chooses(name, spec)}


def split(model: Model, cfg: ModelConfig, what: Full | Lora, key: jax.Array) -> tuple[Trained, Any]:
    """The trained part at its beginning, and the frozen one.

    Raises:
      ValueError: a weight is to be trained and is quantised.
    """
    if isinstance(what, Lora):
        return lora.init(cfg, what, key), model
    trained: Trained = {}

    def take(name: str, spec: ParamSpec, weight: Any) -> Any:
        if not what.chooses(name, spec):
            return weight
        if not isinstance(weight, jax.Array):
            raise ValueError(
                f"'{name}' is quantised and cannot be trained; load the model with"
                " weights='bfloat16' or 'float32', or train an adapter."
            )
        trained[name] = weight
        return None

    return trained, params.map_leaves(take, Model(cfg), model)


def join(
    trained: Trained, frozen: Any, cfg: ModelConfig, what: Full | Lora, key: jax.Array | None = None
) -> Model:
    """The whole model. `key` is for an adapter's dropout; None: there is none."""
    if isinstance(what, Lora):
        return lora.attach(frozen, cfg, what, trained, key)

    def put(name: str, spec: ParamSpec, weight: Any) -> Any:
        if name not in trained:
            return weight
        wide = what.dtype is None or spec.stored == "f32"
        return trained[name] if wide else trained[name].astype(jnp.dtype(what.dtype))

    return params.map_leaves(put, Model(cfg), frozen)
