"""The routed experts: the XLA form against the reference, for few rows and many, in any format."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize
from pallas_kernels.grouped_matmul import expert_mlp

LAYERS, EXPERTS, HIDDEN, INNER = 2, 8, 64, 32


def weights(form: str) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    dense = [rng.normal(size=(LAYERS, EXPERTS, *s)).astype(np.float32) / 8 for s in shapes]
    if form == "dense":
        return [jnp.asarray(w) for w in dense]
    encode = quantize.encode_fp8_blocks if form == "fp8" else quantize.encode_fp4_blocks
    hold = quantize.fp8_from_checkpoint if form == "fp8" else quantize.fp4_from_checkpoint
    leaf = quantize.Fp8Weight if form == "fp8" else quantize.Fp4Weight
    out = []
    for w in dense:
        held = [hold(*encode(matrix)) for matrix in w.reshape(-1, *w.shape[2:])]
        parts = [
            np.stack(part).reshape(LAYERS, EXPERTS, *part[0].shape)
            for part in zip(*held, strict=True)
        ]
        out.append(leaf(*map(jnp.asarray, parts)))
    return out


@pytest.mark.parametrize("form", ["dense", "fp8", "fp4"])
@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
@pytest.mark.parametrize("weight_first", [True, False])
def test_the_xla_form_equals_the_reference(form: str, tokens: int, weight_first: bool) -> None:
    keys = jax.random.split(jax.random.key(tokens), 3)
    x_TD = jax.random.normal(keys[0], (tokens, HIDDEN))
    # Ids on both sides of the range are padding.
    expert_TA = jax.random.randint(keys[1], (tokens, 3), -2, EXPERTS + 2)
    weight_TA = jax.random.uniform(keys[2], (tokens, 3))
    w1, w3, w2 = weights(form)
    run = lambda impl: np.asarray(
        expert_mlp(
            x_TD,
            expert_TA,
            weight_TA,
            w1,
            w3,
            w2,
            jnp.int32(1),
            limit=1.0,
            weight_first=weight_first,
            impl=impl,
        )
    )
    expected = run("reference")
    assert np.abs(expected).max() > 0
    # Sums of 64 float32 products in another order.
    np.testing.assert_allclose(run("xla"), expected, rtol=1e-5, atol=1e-5)
