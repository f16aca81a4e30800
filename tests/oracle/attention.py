"""Attention of one layer over a full sequence: window, compressed entries and their indexer.

Report section 2.3. Axis letters: B batch, T tokens, S compressed entries, P slots pooled into
one entry, D hidden, R query rank, H heads, K head dim, I index heads, J index head dim,
G output groups, U keys of a query (T window positions, then S entries).
"""

import numpy as np
from jaxtyping import Bool, Float

from tests.oracle import formats
from tests.oracle.primitives import (
    Settings,
    Weights,
    inverse_rms,
    linear,
    quant_linear,
    rms_norm,
    rope,
    scope,
    softmax,
)

KV_BLOCK = 64


def compress(
    p: Weights, x_BTD: Float[np.ndarray, "B T D"], ratio: int, s: Settings, *, overlap: bool
) -> Float[np.ndarray, "B S K"]:
    """One rotated entry per complete window of `ratio` tokens; incomplete windows have none.

    With `overlap` the first half of a token's channels is pooled into the entry of the next window,
    the second half into the entry of its own.
    """
    batch, n_tokens, _ = x_BTD.shape
    n = n_tokens // ratio
    complete = x_BTD[:, : n * ratio]
    window_shape = (batch, n, *p["ape"].shape)
    value = linear(complete, p["wkv.weight"]).reshape(window_shape)
    score = linear(complete, p["wgate.weight"]).reshape(window_shape) + p["ape"]
    if overlap:
        value, score = _with_previous(value, 0.0), _with_previous(score, -np.inf)
    pooled_BSK = np.sum(softmax(score, axis=2) * value, axis=2)
    entry_BSK = rms_norm(pooled_BSK, p["norm.weight"], s)
    return rope(entry_BSK, np.arange(n) * ratio, s, compressed=True)


def _with_previous(
    x_BSPC: Float[np.ndarray, "B S P 2*K"], before_first: float
) -> Float[np.ndarray, "B S 2*P K"]:
    """Slots of the previous window (first half of the channels), then of this one (second half)."""
    half = x_BSPC.shape[-1] // 2
    own, forwarded = x_BSPC[..., half:], x_BSPC[..., :half]
    padding = np.full_like(forwarded[:, :1], before_first)
    previous = np.concatenate([padding, forwarded], axis=1)[:, : x_BSPC.shape[1]]
    return np.concatenate([previous, own], axis=2)


def causal_entries(n_tokens: int, ratio: int) -> Bool[np.ndarray, "T S"]:
    """Entry s is visible from the last token of its own window on."""
    complete_T1 = (np.arange(n_tokens)[:, None] + 1) // ratio
    return np.arange(n_tokens // ratio) < complete_T1


def index_scores(
    p: Weights,
    x_BTD: Float[np.ndarray, "B T D"],
    qr_BTR: Float[np.ndarray, "B T R"],
    ratio: int,
    s: Settings,
) -> Float[np.ndarray, "B T S"]:
    """The score of each entry for each query, causal or not."""
    batch, n_tokens, _ = x_BTD.shape
    n_heads, n_dim = s["index_n_heads"], s["index_head_dim"]
    q_BTIJ = quant_linear(qr_BTR, p["wq_b.weight"], s).reshape(batch, n_tokens, n_heads, n_dim)
    q_BTIJ = rope(q_BTIJ, np.arange(n_tokens), s, compressed=True)
    k_BSJ = compress(scope(p, "compressor.", s), x_BTD, ratio, s, overlap=True)
    if s.official:
        q_BTIJ = formats.fake_quant_fp4(formats.hadamard(q_BTIJ))
        k_BSJ = formats.fake_quant_fp4(formats.hadamard(k_BSJ))
    dots_BTIS = np.einsum("btij,bsj->btis", q_BTIJ, k_BSJ, optimize=True)
    weight_BTI = linear(x_BTD, p["weights_proj.weight"]) * (n_dim**-0.5 * n_heads**-0.5)
    return np.einsum("btis,bti->bts", np.maximum(dots_BTIS, 0), weight_BTI, optimize=True)


def best_entries(
    score_BTS: Float[np.ndarray, "B T S"], causal_TS: Bool[np.ndarray, "T S"], top_k: int
) -> Bool[np.ndarray, "B T S"]:
    """The `top_k` causal entries with the highest scores; ties go to the earlier entry."""
    order = np.argsort(-np.where(causal_TS, score_BTS, -np.inf), axis=-1, kind="stable")
    chosen_BTS = np.zeros(score_BTS.shape, dtype=bool)
    np.put_along_axis(chosen_BTS, order[..., :top_k], True, axis=-1)
    return chosen_BTS & causal_TS


def attend(
    q_BTHK: Float[np.ndarray, "B T H K"],
    kv_BUK: Float[np.ndarray, "B U K"],
    visible_BTU: Bool[np.ndarray, "B T U"],
    sink_H: Float[np.ndarray, " H"],
) -> Float[np.ndarray, "B T H K"]:
    """One softmax over the visible keys, which are also the values, and each head's sink."""
    score = np.einsum("bthk,buk->bthu", q_BTHK, kv_BUK, optimize=True) * q_BTHK.shape[-1] ** -0.5
    score = np.where(visible_BTU[:, :, None], score, -np.inf)
    top = score.max(axis=-1, keepdims=True)
    e_BTHU = np.exp(score - top)
    total = e_BTHU.sum(axis=-1, keepdims=True) + np.exp(sink_H[:, None] - top)
    return np.einsum("bthu,buk->bthk", e_BTHU / total, kv_BUK, optimize=True)


def _rounded_kv(kv: Float[np.ndarray, "B n K"], s: Settings) -> Float[np.ndarray, "B n K"]:
    """KV as the official cache keeps it: rope dims unrounded, the others in FP8."""
    if not s.official:
        return kv
    n_rope = s["qk_rope_head_dim"]
    return np.concatenate(
        [formats.fake_quant_fp8(kv[..., :-n_rope], KV_BLOCK), kv[..., -n_rope:]], axis=-1
    )


def _compressed_keys(
    p: Weights,
    x_BTD: Float[np.ndarray, "B T D"],
    qr_BTR: Float[np.ndarray, "B T R"],
    kind: str,
    ratio: int,
    s: Settings,
) -> tuple[Float[np.ndarray, "B S K"], Bool[np.ndarray, "B T S"]]:
    """Compressed entries, and which query sees which of them."""
    batch, n_tokens, _ = x_BTD.shape
    entry_BSK = compress(scope(p, "compressor.", s), x_BTD, ratio, s, overlap=kind == "csa")
    causal_TS = causal_entries(n_tokens, ratio)
    if kind == "hca":
        return _rounded_kv(entry_BSK, s), np.broadcast_to(causal_TS, (batch, *causal_TS.shape))
    score_BTS = index_scores(scope(p, "indexer.", s), x_BTD, qr_BTR, ratio, s)
    return _rounded_kv(entry_BSK, s), best_entries(score_BTS, causal_TS, s["index_topk"])


def _grouped_output(
    p: Weights, out_BTHK: Float[np.ndarray, "B T H K"], s: Settings
) -> Float[np.ndarray, "B T D"]:
    batch, n_tokens = out_BTHK.shape[:2]
    grouped = out_BTHK.reshape(batch, n_tokens, s["o_groups"], -1)
    wo_a = p["wo_a.weight"].reshape(s["o_groups"], s["o_lora_rank"], -1)
    low_rank = np.einsum("btgi,goi->btgo", grouped, wo_a, optimize=True)
    return quant_linear(low_rank.reshape(batch, n_tokens, -1), p["wo_b.weight"], s)


def attention(
    p: Weights, x_BTD: Float[np.ndarray, "B T D"], kind: str, ratio: int, s: Settings
) -> Float[np.ndarray, "B T D"]:
    """A layer's attention over a sequence that starts at position 0.

    Args:
      p: the layer's weights under `attn.`.
      x_BTD: normalised input.
      kind: "sliding", "csa" or "hca".
      ratio: tokens per compressed entry; unused by "sliding".
      s: settings of the computation.
    """
    batch, n_tokens, _ = x_BTD.shape
    compressed = kind != "sliding"
    positions = np.arange(n_tokens)
    qr_BTR = rms_norm(quant_linear(x_BTD, p["wq_a.weight"], s), p["q_norm.weight"], s)
    q_BTHK = quant_linear(qr_BTR, p["wq_b.weight"], s)
    q_BTHK = q_BTHK.reshape(batch, n_tokens, s["num_attention_heads"], s["head_dim"])
    q_BTHK = q_BTHK * inverse_rms(q_BTHK, s["rms_norm_eps"])
    q_BTHK = rope(q_BTHK, positions, s, compressed=compressed)
    kv_BUK = rms_norm(quant_linear(x_BTD, p["wkv.weight"], s), p["kv_norm.weight"], s)
    kv_BUK = _rounded_kv(rope(kv_BUK, positions, s, compressed=compressed), s)

    age_TT = positions[:, None] - positions
    window_TT = (age_TT >= 0) & (age_TT < s["sliding_window"])
    visible_BTU = np.broadcast_to(window_TT, (batch, *window_TT.shape))
    if compressed:
        entry_BSK, entry_visible_BTS = _compressed_keys(p, x_BTD, qr_BTR, kind, ratio, s)
        kv_BUK = np.concatenate([kv_BUK, entry_BSK], axis=1)
        visible_BTU = np.concatenate([visible_BTU, entry_visible_BTS], axis=2)

    out_BTHK = attend(q_BTHK, kv_BUK, visible_BTU, p["attn_sink"])
    out_BTHK = rope(out_BTHK, positions, s, compressed=compressed, inverse=True)
    return _grouped_output(p, out_BTHK, s)
