"""Compression of token windows into entries (report, sections 2.3.1 and 2.3.2).

Entry i of ratio M pools the tokens of window i, i * M .. i * M + M - 1, by a softmax per channel.
With overlap (CSA) each token has two series side by side: the first half of its channels serves
the next window's entry, the second half its own.

Axis letters: B batch, X tokens, n windows, M ratio, C channels (overlap * K), K entry channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def pool(
    kv_BXC: Float[Array, "B X C"],
    gate_BXC: Float[Array, "B X C"],
    bias_MC: Float[Array, "M C"],
    first_B: Int[Array, " B"],
    *,
    overlap: int,
) -> Float32[Array, "B n K"]:
    """Softmax-gated sums of windows first, first + 1, ...

    Args:
      kv_BXC: tokens of the windows first - overlap + 1 .. first + n - 1: (n + overlap - 1) * M.
      gate_BXC: their gate logits, without the positional bias.
      bias_MC: added to the gate by position in the window (the checkpoint's `ape`).
      first_B: index of the first entry wanted; windows of negative index count for nothing.
      overlap: 1 or 2 windows per entry.

    Returns:
      One row per entry, in float32. What a window's tokens beyond the text hold is the caller's
      affair: such entries are not visible yet.
    """
    M, C = bias_MC.shape
    B, X, _ = kv_BXC.shape
    K, n = C // overlap, X // M - overlap + 1
    windows = lambda x: x.astype(jnp.float32).reshape(B, X // M, M, overlap, K)
    gate_BWMOK = windows(gate_BXC) + bias_MC.astype(jnp.float32).reshape(1, 1, M, overlap, K)
    kv_BWMOK = windows(kv_BXC)
    series = lambda x: jnp.concatenate([x[:, o : o + n, :, o] for o in range(overlap)], axis=2)
    gate_BnJK, kv_BnJK = series(gate_BWMOK), series(kv_BWMOK)
    if overlap > 1:
        # Only window 0 has no predecessor; its missing half must not add to the softmax.
        window_Bn = first_B[:, None] + jnp.arange(n)[None]
        earlier_J = jnp.arange(gate_BnJK.shape[2]) < M
        missing = (window_Bn == 0)[..., None, None] & earlier_J[None, None, :, None]
        gate_BnJK = jnp.where(missing, -jnp.inf, gate_BnJK)
        kv_BnJK = jnp.where(missing, 0.0, kv_BnJK)
    return jnp.sum(jax.nn.softmax(gate_BnJK, axis=2) * kv_BnJK, axis=2)
