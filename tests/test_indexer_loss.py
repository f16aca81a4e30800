"""The indexer's divergence from attention, against float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.model import indexer_divergence

B, T, H, K, INDEX_HEADS, J, S, WINDOW = 2, 64, 3, 8, 2, 8, 16, 12
SCALE = K**-0.5


def arguments(seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    index = draw(B, T, INDEX_HEADS, J), draw(B, T, INDEX_HEADS), draw(B, S, J)
    return index, (draw(B, T, H, K), draw(B, T + WINDOW, K), draw(B, S, K), draw(H))


def divergence_in_numpy(
    index: Any, attention: Any, visible: Any, hidden: Any, first: Any
) -> np.ndarray:
    q, weights, keys = (np.asarray(x, np.float64) for x in index)
    query, window, pool, sink = (np.asarray(x, np.float64) for x in attention)
    out = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        entries = np.arange(hidden[b, t], visible[b, t])
        if not len(entries):
            continue
        near = [x for x in range(t + 1, t + WINDOW + 1) if x - WINDOW >= first[b, t]]
        target = np.zeros(len(entries))
        for h in range(H):
            far = np.exp(pool[b, entries] @ query[b, t, h] * SCALE)
            rest = np.exp(window[b, near] @ query[b, t, h] * SCALE).sum() + np.exp(sink[h])
            target += far / (far.sum() + rest)
        target /= target.sum()
        score = np.maximum(keys[b, entries] @ q[b, t].T, 0) @ weights[b, t]
        student = score - np.log(np.exp(score - score.max()).sum()) - score.max()
        out[b, t] = np.sum(target * (np.log(target) - student))
    return out


def bounds(document: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    at_T = jnp.arange(T, dtype=jnp.int32)
    first_T = jnp.where(at_T >= 32, 32, 0) if document else jnp.zeros_like(at_T)
    rows = lambda x: jnp.broadcast_to(x, (B, T))
    return rows((at_T + 1) // 4), rows(first_T // 4), rows(first_T)


@pytest.mark.parametrize("document", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_divergence_matches_float64_numpy(
    document: bool, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(indexer_divergence, "_LOGITS", B * H * S * 16)
    index, attention = arguments()
    visible, hidden, first = bounds(document)
    optional = (hidden, first) if document else (None, None)
    actual = indexer_divergence.divergence(index, attention, visible, *optional, scale=SCALE)
    expected = divergence_in_numpy(index, attention, visible, hidden, first)
    assert expected.max() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


def test_gradients_reach_only_the_indexer_and_match_finite_differences() -> None:
    index, attention = arguments(1)
    visible, _, _ = bounds(False)

    def total(index: Any, attention: Any) -> Any:
        return jnp.sum(
            indexer_divergence.divergence(index, attention, visible, None, None, scale=SCALE)
        )

    to_index, to_attention = jax.grad(total, argnums=(0, 1))(index, attention)
    assert all(not np.any(part) for part in to_attention)
    zeros = np.zeros((B, T), np.int32)
    of_index = lambda index: divergence_in_numpy(index, attention, visible, zeros, zeros).sum()
    for part in range(3):
        rng = np.random.default_rng(part)
        direction = rng.standard_normal(index[part].shape)
        moved = lambda by, part=part, direction=direction: tuple(
            np.asarray(x, np.float64) + (by * direction if i == part else 0)
            for i, x in enumerate(index)
        )
        slope = (of_index(moved(1e-5)) - of_index(moved(-1e-5))) / 2e-5
        np.testing.assert_allclose(np.sum(to_index[part] * direction), slope, rtol=1e-3)
