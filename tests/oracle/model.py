"""All of DeepSeek-V4 over complete sequences: hyper-connections, experts, blocks, heads, MTP.

Axis letters: B batch, T tokens, D hidden, N hyper-connection streams (M where a second letter is
needed), X tokens of all rows together, E experts, C experts chosen per token, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tests.oracle.attention import attention
from tests.oracle.primitives import (
    Settings,
    Weights,
    inverse_rms,
    linear,
    make_settings,
    quant_linear,
    rms_norm,
    scope,
    sigmoid,
    softmax,
)


class Output(NamedTuple):
    """Logits [B, T, V], and the streams [B, T, N, D] before they are merged for the head."""

    logits: np.ndarray
    streams: np.ndarray


def _mixes(
    x_BTND: Float[np.ndarray, "B T N D"], fn: Float[np.ndarray, "m N*D"], s: Settings
) -> Float[np.ndarray, "B T m"]:
    flat = x_BTND.reshape(*x_BTND.shape[:2], -1)
    return linear(flat, fn) * inverse_rms(flat, s["rms_norm_eps"])


def sinkhorn(logits: Float[np.ndarray, "... N M"], s: Settings) -> Float[np.ndarray, "... N M"]:
    """A nearly doubly stochastic matrix: rows (first by softmax) and columns normalised in turn."""
    eps = s["hc_eps"]
    comb = softmax(logits, axis=-1) + eps
    comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    for _ in range(s["hc_sinkhorn_iters"] - 1):
        comb = comb / (comb.sum(axis=-1, keepdims=True) + eps)
        comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    return comb


def merge_streams(
    x_BTND: Float[np.ndarray, "B T N D"], p: Weights, s: Settings
) -> Float[np.ndarray, "B T D"]:
    """The head's input: the sum of the streams, weighted by gates computed from them."""
    mix = _mixes(x_BTND, p["hc_head_fn"], s)
    gate_BTN = sigmoid(mix * p["hc_head_scale"] + p["hc_head_base"]) + s["hc_eps"]
    return np.einsum("btn,btnd->btd", gate_BTN, x_BTND)


def hyper_connected(
    x_BTND: Float[np.ndarray, "B T N D"],
    p: Weights,
    name: str,
    sublayer: Callable[[np.ndarray], np.ndarray],
    s: Settings,
) -> Float[np.ndarray, "B T N D"]:
    """Read one input from the streams, run `sublayer`, write its output back to all of them.

    Report section 2.2. `name` is "attn" or "ffn"; `sublayer` maps [B, T, D] to [B, T, D]; its
    input is normalised.
    """
    n = s["hc_mult"]
    mix = _mixes(x_BTND, p[f"hc_{name}_fn"], s)
    scale, base = p[f"hc_{name}_scale"], p[f"hc_{name}_base"]
    pre_BTN = sigmoid(mix[..., :n] * scale[0] + base[:n]) + s["hc_eps"]
    post_BTN = 2 * sigmoid(mix[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    comb_logits = mix[..., 2 * n :] * scale[2] + base[2 * n :]
    comb_BTNM = sinkhorn(comb_logits.reshape(*mix.shape[:2], n, n), s)
    read_BTD = np.einsum("btn,btnd->btd", pre_BTN, x_BTND)
    out_BTD = sublayer(rms_norm(read_BTD, p[f"{name}_norm.weight"], s))
    carried = np.einsum("btnm,btnd->btmd", comb_BTNM, x_BTND)
    return post_BTN[..., None] * out_BTD[:, :, None] + carried


def route(
    p: Weights, x_XD: Float[np.ndarray, "X D"], tokens_X: Int[np.ndarray, " X"], s: Settings
) -> Float[np.ndarray, "X E"]:
    """The weight of every expert for every token, zero where it is not chosen.

    A layer with `gate.tid2eid` looks up its experts by token id; any other takes the best by score
    plus bias. If a row of `tid2eid` repeats an expert, DeepSeek's code counts it once and
    transformers twice.
    """
    score_XE = np.sqrt(np.logaddexp(0, linear(x_XD, p["gate.weight"])))
    if "gate.tid2eid" in p:
        chosen_XC = p["gate.tid2eid"][tokens_X]
    else:
        order = np.argsort(-(score_XE + p["gate.bias"]), axis=-1, kind="stable")
        chosen_XC = order[:, : s["num_experts_per_tok"]]
    weight_XC = np.take_along_axis(score_XE, chosen_XC, axis=-1)
    weight_XC = weight_XC / weight_XC.sum(axis=-1, keepdims=True) * s["routed_scaling_factor"]
    weight_XE = np.zeros_like(score_XE)
    if s.official:
        np.put_along_axis(weight_XE, chosen_XC, weight_XC, axis=-1)
    else:
        np.add.at(weight_XE, (np.arange(len(x_XD))[:, None], chosen_XC), weight_XC)
    return weight_XE


def expert(
    p: Weights,
    prefix: str,
    x_XD: Float[np.ndarray, "X D"],
    weight_X1: Float[np.ndarray, "X 1"],
    s: Settings,
) -> Float[np.ndarray, "X D"]:
    """A clamped SwiGLU. The routing weight is applied before `w2` rounds its input."""
    limit = s["swiglu_limit"]
    gate = np.minimum(quant_linear(x_XD, p[f"{prefix}w1.weight"], s), limit)
    up = np.clip(quant_linear(x_XD, p[f"{prefix}w3.weight"], s), -limit, limit)
    return quant_linear(gate * sigmoid(gate) * up * weight_X1, p[f"{prefix}w2.weight"], s)


def feed_forward(
    p: Weights, x_BTD: Float[np.ndarray, "B T D"], tokens_BT: Int[np.ndarray, "B T"], s: Settings
) -> Float[np.ndarray, "B T D"]:
    """The chosen experts plus the shared one, which is clamped as they are."""
    x_XD = x_BTD.reshape(-1, x_BTD.shape[-1])
    weight_XE = route(p, x_XD, tokens_BT.reshape(-1), s)
    out_XD = expert(p, "shared_experts.", x_XD, np.ones((len(x_XD), 1), s.dtype), s)
    for e in range(s["n_routed_experts"]):
        rows = np.flatnonzero(weight_XE[:, e])
        out_XD[rows] += expert(p, f"experts.{e}.", x_XD[rows], weight_XE[rows, e, None], s)
    return out_XD.reshape(x_BTD.shape)


def block(
    p: Weights,
    x_BTND: Float[np.ndarray, "B T N D"],
    tokens_BT: Int[np.ndarray, "B T"],
    kind: str,
    ratio: int,
    s: Settings,
) -> Float[np.ndarray, "B T N D"]:
    """One layer: attention, then experts, each inside its hyper-connection."""
    attn, ffn = scope(p, "attn.", s), scope(p, "ffn.", s)
    x_BTND = hyper_connected(x_BTND, p, "attn", lambda x: attention(attn, x, kind, ratio, s), s)
    return hyper_connected(x_BTND, p, "ffn", lambda x: feed_forward(ffn, x, tokens_BT, s), s)


def layer_kinds(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(kind, ratio) of each backbone layer; the released list ends with those of the MTP layers.

    `layer_kinds` in the config, a list of "sliding", "csa" and "hca", overrides the kinds that the
    ratios imply: 0 is sliding, 4 is CSA and any other is HCA.
    """
    ratios = config["compress_ratios"][: config["num_hidden_layers"]]
    implied = [{0: "sliding", 4: "csa"}.get(ratio, "hca") for ratio in ratios]
    return list(zip(config.get("layer_kinds", implied), ratios, strict=True))


def _head(
    x_BTND: Float[np.ndarray, "B T N D"],
    p: Weights,
    head_VD: Float[np.ndarray, "V D"],
    s: Settings,
) -> Output:
    x_BTD = rms_norm(merge_streams(x_BTND, p, s), p["norm.weight"], s)
    return Output(linear(x_BTD, head_VD), x_BTND)


def forward(
    weights: Weights,
    config: Mapping[str, Any],
    tokens: Int[np.ndarray, "B T"],
    *,
    numerics: str,
    dtype: type[np.floating] = np.float64,
    linear_quant: bool = False,
) -> Output:
    """Logits and streams of sequences that start at position 0.

    All arithmetic is in `dtype`: the BF16 casts of DeepSeek's code are left out, so in float64 the
    only roundings are those named below, of exact values.

    Args:
      weights: dequantised weights under DeepSeek's release names; matrices are [out, in].
      config: the released config.json as a dict, optionally with `layer_kinds`.
      tokens: token ids.
      numerics: "hf" computes what transformers does, without any rounding. "official" adds the
        Hadamard transform and FP4 rounding of the indexer's queries and keys, and FP8 rounding of
        the KV's non-rope dims.
      dtype: np.float64 or np.float32.
      linear_quant: also round the input of each linear whose weight is released in FP8 or FP4.

    Raises:
      ValueError: an unknown `numerics`, or `linear_quant` without "official".
    """
    s = make_settings(config, numerics, dtype, linear_quant)
    top = {k: weights[k].astype(dtype) for k in weights if not k.startswith(("layers.", "mtp."))}
    x_BTND = np.repeat(top["embed.weight"][tokens][:, :, None], s["hc_mult"], axis=2)
    for i, (kind, ratio) in enumerate(layer_kinds(config)):
        x_BTND = block(scope(weights, f"layers.{i}.", s), x_BTND, tokens, kind, ratio, s)
    return _head(x_BTND, top, top["head.weight"], s)


def mtp_forward(
    weights: Weights,
    config: Mapping[str, Any],
    streams: Float[np.ndarray, "B T N D"],
    next_tokens: Int[np.ndarray, "B T"],
    *,
    numerics: str,
    dtype: type[np.floating] = np.float64,
    linear_quant: bool = False,
    index: int = 0,
) -> Output:
    """The MTP module of the preview releases: predicts the token after each of `next_tokens`.

    Position t combines the backbone's streams at t with the embedding of the token at t + 1, and
    keeps position t. The module is one sliding layer with scored experts between its own norms and
    its own hyper-connection head; embedding and output matrix are the backbone's.

    Args:
      weights: as in `forward`, with those under `mtp.{index}.`.
      config: as in `forward`.
      streams: `Output.streams` of the backbone, from position 0.
      next_tokens: token ids, one position after those that `streams` come from.
      numerics: as in `forward`.
      dtype: as in `forward`.
      linear_quant: as in `forward`.
      index: number of the module.
    """
    s = make_settings(config, numerics, dtype, linear_quant)
    p = scope(weights, f"mtp.{index}.", s)
    embedded_BTD = weights["embed.weight"].astype(dtype)[next_tokens]
    token_BTD = quant_linear(rms_norm(embedded_BTD, p["enorm.weight"], s), p["e_proj.weight"], s)
    normed_BTND = rms_norm(streams.astype(dtype), p["hnorm.weight"], s)
    x_BTND = token_BTD[:, :, None] + quant_linear(normed_BTND, p["h_proj.weight"], s)
    x_BTND = block(p, x_BTND, next_tokens, "sliding", 0, s)
    return _head(x_BTND, p, weights["head.weight"].astype(dtype), s)
