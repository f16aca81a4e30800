"""Small models with random weights, shared by the tests of the model's behaviour."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from v4jax import presets
from v4jax.checkpoints import tensor_names
from v4jax.decoding import steps
from v4jax.model import cache as caches
from v4jax.model import params
from v4jax.model.cache import Cache
from v4jax.model.config import LayerKind, ModelConfig
from v4jax.model.numerics import HF, Numerics
from v4jax.model.transformer import Model

SLIDING, CSA, HCA = ("sliding", 0), ("csa", 4), ("hca", 16)


def config(*attention: tuple[Any, int], hashed: int = 1, **changes: Any) -> ModelConfig:
    """A configuration in which every mechanism takes effect within a hundred tokens."""
    layers = tuple(
        LayerKind(kind, ratio, "hash" if i < hashed else "routed")
        for i, (kind, ratio) in enumerate(attention)
    )
    small: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": 12,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 6,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 0,
        "quantized": False,
        "expert_dtype": None,
        "initializer_range": 0.08,
        "eos_token_ids": (),
    }
    return dataclasses.replace(presets.get("tiny"), layers=layers, **(small | changes))


@functools.cache
def weights(cfg: ModelConfig, seed: int = 0) -> Model:
    return params.init(Model(cfg), jax.random.key(seed), jnp.float32)


def tokens(cfg: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, length), np.int32)


@dataclasses.dataclass
class Runner:
    """Feeds chunks to a model and keeps its cache."""

    cfg: ModelConfig
    batch: int
    capacity: int
    numerics: Numerics = HF
    seed: int = 0

    def __post_init__(self) -> None:
        self.cache: Cache = caches.make(self.cfg, self.batch, self.capacity, jnp.float32)

    def feed(self, tokens_BT: np.ndarray, count_B: list[int] | None = None) -> np.ndarray:
        """Logits at every position of the chunk."""
        count = [tokens_BT.shape[1]] * self.batch if count_B is None else count_B
        logits_BTV, self.cache = steps.logits(
            weights(self.cfg, self.seed),
            jnp.asarray(tokens_BT),
            self.cache,
            jnp.array(count, jnp.int32),
            cfg=self.cfg,
            numerics=self.numerics,
        )
        return np.asarray(logits_BTV)

    def rewind(self, *rejected: int) -> None:
        self.cache = caches.rewind(self.cache, jnp.array(rejected, jnp.int32))


def full_logits(cfg: ModelConfig, tokens_BT: np.ndarray, numerics: Numerics = HF) -> np.ndarray:
    """Logits of the tokens fed as one chunk."""
    batch, length = tokens_BT.shape
    return Runner(cfg, batch, max(length, 16), numerics).feed(tokens_BT)


def from_release(release: dict[str, np.ndarray], cfg: ModelConfig) -> Model:
    """A float32 model from arrays under the release's tensor names."""

    def stack(names: Any) -> np.ndarray:
        if isinstance(names, str):
            return np.asarray(release[names])
        return np.stack([stack(name) for name in names])

    def fill(name: str, spec: params.ParamSpec) -> jax.Array:
        dtype = jnp.int32 if spec.stored == "i64" else jnp.float32
        return jnp.asarray(stack(tensor_names.release_names(name, cfg)), dtype)

    return params.map_leaves(fill, Model(cfg))


@contextlib.contextmanager
def programs() -> Iterator[list[str]]:
    """Collect the names of the functions compiled in this context."""
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(kwargs["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
