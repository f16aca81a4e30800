"""Building blocks of the oracle's layers: settings, norms, linears and rotary embedding.

Axis letters: B batch, T tokens, R rope dims (pairs x 2); `...` is any leading shape.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tests.oracle import formats

Weights = Mapping[str, np.ndarray]
LINEAR_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Settings:
    """A released config.json and how to compute the model."""

    config: Mapping[str, Any]
    official: bool
    dtype: type[np.floating]
    linear_quant: bool

    def __getitem__(self, key: str) -> Any:
        """The config's value."""
        return self.config[key]


def make_settings(
    config: Mapping[str, Any], numerics: str, dtype: type[np.floating], linear_quant: bool
) -> Settings:
    """Settings whose switches are checked against each other."""
    if numerics not in ("hf", "official"):
        raise ValueError(f"numerics is {numerics!r}; it must be 'hf' or 'official'.")
    if linear_quant and numerics == "hf":
        raise ValueError("linear_quant rounds and numerics='hf' does not; use 'official'.")
    return Settings(config, numerics == "official", dtype, linear_quant)


def scope(weights: Weights, prefix: str, s: Settings) -> dict[str, np.ndarray]:
    """The weights under `prefix`, which their names lose, in the dtype of the computation."""
    return {
        name.removeprefix(prefix): _cast(w, s)
        for name, w in weights.items()
        if name.startswith(prefix)
    }


def _cast(w: np.ndarray, s: Settings) -> np.ndarray:
    is_table = np.issubdtype(w.dtype, np.integer)
    return w if is_table else w.astype(s.dtype, copy=False)


def sigmoid(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def softmax(x: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Softmax over one axis, along which at least one score must be finite."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def inverse_rms(x: Float[np.ndarray, "... n"], eps: float) -> Float[np.ndarray, "... 1"]:
    """1 / sqrt(mean square of the last axis + eps)."""
    return 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm(
    x: Float[np.ndarray, "... n"], scale: Float[np.ndarray, " n"], s: Settings
) -> Float[np.ndarray, "... n"]:
    """Root-mean-square norm of the last axis."""
    return x * inverse_rms(x, s["rms_norm_eps"]) * scale


def linear(
    x: Float[np.ndarray, "... i"], w: Float[np.ndarray, "o i"]
) -> Float[np.ndarray, "... o"]:
    """`x` times an [out, in] matrix that is released in BF16 or float32."""
    return x @ w.T


def quant_linear(
    x: Float[np.ndarray, "... i"], w: Float[np.ndarray, "o i"], s: Settings
) -> Float[np.ndarray, "... o"]:
    """`x` times an [out, in] matrix that is released in FP8 or FP4.

    With `linear_quant` the input is rounded to FP8 first, per token and block of 128 channels.
    """
    return (formats.fake_quant_fp8(x, LINEAR_BLOCK) if s.linear_quant else x) @ w.T


def _yarn_bound(rotations: float, theta: float, n_rope: int, original: int) -> float:
    return n_rope * np.log(original / (rotations * 2 * np.pi)) / (2 * np.log(theta))


def rope_frequencies(s: Settings, compressed: bool) -> Float[np.ndarray, " pairs"]:
    """Radians per position of each pair.

    Layers with compressed entries use their own theta and YaRN; sliding layers use neither.
    """
    n_rope = s["qk_rope_head_dim"]
    theta = s["compress_rope_theta"] if compressed else s["rope_theta"]
    exponent = np.arange(0, n_rope, 2, dtype=s.dtype) / n_rope
    freq = 1 / s.dtype(theta) ** exponent
    yarn = s["rope_scaling"]
    if not compressed:
        return freq
    original = yarn["original_max_position_embeddings"]
    low = np.floor(_yarn_bound(yarn["beta_fast"], theta, n_rope, original))
    high = np.ceil(_yarn_bound(yarn["beta_slow"], theta, n_rope, original))
    low, high = max(low, 0), min(high, n_rope - 1)
    pair = np.arange(n_rope // 2, dtype=s.dtype)
    ramp = np.clip((pair - s.dtype(low)) / s.dtype(max(high - low, 1e-3)), 0, 1)
    keep = 1 - ramp
    return freq / yarn["factor"] * (1 - keep) + freq * keep


def rope(
    x: Float[np.ndarray, "B T ... n"],
    positions_T: Int[np.ndarray, " T"],
    s: Settings,
    *,
    compressed: bool,
    inverse: bool = False,
) -> Float[np.ndarray, "B T ... n"]:
    """Rotate the last `qk_rope_head_dim` dims of `x`, in adjacent pairs, by their position."""
    n_rope = s["qk_rope_head_dim"]
    angle = positions_T.astype(s.dtype)[:, None] * rope_frequencies(s, compressed)
    angle = angle.reshape(len(positions_T), *[1] * (x.ndim - 3), n_rope // 2)
    cos, sin = np.cos(angle), np.sin(-angle if inverse else angle)
    tail = x[..., -n_rope:]
    real, imag = tail[..., 0::2], tail[..., 1::2]
    rotated = np.stack([real * cos - imag * sin, real * sin + imag * cos], axis=-1)
    return np.concatenate([x[..., :-n_rope], rotated.reshape(tail.shape)], axis=-1)
