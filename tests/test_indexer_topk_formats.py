"""Keys in the formats of caches, and the scores' gradients, in the forms for every platform.

Axis letters: B batch, T queries, I index heads, J index head dim, S entries.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import indexer_topk, targets
from pallas_kernels.indexer_topk import Fp8Keys, keys, reference, to_fp4, to_fp8
from pallas_kernels.paged import Paged
from tests.test_indexer_topk import whole_numbers


def of_format(name: str, keys_LBSJ: jax.Array) -> Any:
    """The same keys in a format; integers up to 3 are exact in every one."""
    match name:
        case "fp8":
            return to_fp8(keys_LBSJ)
        case "fp8, float32 scales":
            fp8 = to_fp8(keys_LBSJ)
            return Fp8Keys(fp8.codes, fp8.scale.astype(jnp.float32))
        case "fp4":
            return to_fp4(keys_LBSJ)
        case _:
            L, B, S, J = keys_LBSJ.shape
            order_BM = np.random.default_rng(0).permutation(B * S // 20).reshape(B, -1)
            pages_LPNJ = jnp.zeros((L, B * S // 20, 20, J))
            pages_LPNJ = pages_LPNJ.at[:, order_BM.reshape(-1)].set(keys_LBSJ.reshape(L, -1, 20, J))
            return Paged(pages_LPNJ, jnp.asarray(order_BM, jnp.int32))


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("name", ["fp8", "fp8, float32 scales", "fp4", "pages"])
def test_every_format_leads_to_the_same_choice(name: str, impl: Any) -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = map(jnp.asarray, whole_numbers(1, 2, 3, 4, 64, 300))
    rest = jnp.int32(1), jnp.asarray([[300, 0, 77], [299, 128, 1]], jnp.int32)
    select = jax.jit(indexer_topk.select, static_argnames=("k", "impl"))
    expected = select(q_BTIJ, weights_BTI, keys_LBSJ, *rest, k=16, impl=impl)
    stored = of_format(name, keys_LBSJ)
    np.testing.assert_array_equal(
        select(q_BTIJ, weights_BTI, stored, *rest, k=16, impl=impl), expected
    )
    np.testing.assert_array_equal(keys.dense(stored, jnp.int32(1)), keys_LBSJ[1])


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_queries_in_fp8(impl: Any) -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = map(jnp.asarray, whole_numbers(2, 1, 2, 4, 8, 100))
    rest = jnp.int32(0), jnp.full((1, 2), 100, jnp.int32)
    q8_BTIJ, keys8 = q_BTIJ.astype(jnp.float8_e4m3fn), to_fp8(keys_LBSJ)
    chosen = indexer_topk.select(q8_BTIJ, weights_BTI, keys8, *rest, k=7, impl=impl)
    expected = indexer_topk.select(q_BTIJ, weights_BTI, keys_LBSJ, *rest, k=7, impl=impl)
    np.testing.assert_array_equal(chosen, expected)


# XLA's plain emitters cannot round to FP4.
@pytest.mark.full_compilation
def test_rounding_is_to_nearest_within_the_format() -> None:
    """E4M3 is off by less than 2^-3 of a value, E2M1 by at most 1/3 of its block's largest."""
    keys_LBSJ = jax.random.normal(jax.random.key(0), (1, 2, 70, 64)) * 1e-3
    fp8, fp4 = (jax.jit(f)(keys_LBSJ) for f in (to_fp8, to_fp4))
    dense8, dense4 = (jax.jit(keys.dense)(stored, jnp.int32(0)) for stored in (fp8, fp4))
    assert float(jnp.max(jnp.abs(dense8 - keys_LBSJ[0]) / jnp.abs(keys_LBSJ[0]))) < 2**-3
    blocks = jnp.abs(keys_LBSJ[0]).reshape(2, 70, 2, 32)
    error = jnp.abs(dense4 - keys_LBSJ[0]).reshape(2, 70, 2, 32)
    # Between 4 and 6 the step is twice a scale of at most amax / 3; rounding is off by half a step.
    assert float(jnp.max(jnp.max(error, -1) / jnp.max(blocks, -1))) <= 1 / 3
    fp4_scale = fp4.scale.astype(jnp.float32).reshape(2, 2, 128)[..., :70].swapaxes(1, 2)
    assert jnp.all(fp4_scale * 6 >= jnp.max(blocks, -1))
    assert jnp.all(keys.dense(to_fp8(jnp.zeros((1, 1, 3, 32))), jnp.int32(0)) == 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_the_scores_match_the_reference(dtype: Any) -> None:
    """Float32: a sum over 40 terms in another order. Bfloat16: the products' own rounding."""
    draws = jax.random.split(jax.random.key(1), 4)
    q_BTIJ = jax.random.normal(draws[0], (2, 5, 3, 8)).astype(dtype)
    weights_BTI = jax.random.normal(draws[1], (2, 5, 3))
    keys_BSJ = jax.random.normal(draws[2], (2, 40, 8)).astype(dtype)
    target_BTS = jax.nn.softmax(jax.random.normal(draws[3], (2, 5, 40)))

    def loss(*args: Any, impl: Any) -> jax.Array:
        """Like the indexer's own loss: the divergence from a distribution."""
        score_BTS = indexer_topk.scores(*args, impl=impl)
        return -jnp.sum(target_BTS * jax.nn.log_softmax(score_BTS))

    args = q_BTIJ, weights_BTI, keys_BSJ
    gradients = lambda impl: jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnames="impl")(
        *args, impl=impl
    )
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(np.float32), b.astype(np.float32), rtol=tolerance, atol=tolerance
        ),
        gradients("auto"),
        gradients("reference"),
    )


@pytest.mark.full_compilation
def test_training_never_materialises_the_products_of_all_heads() -> None:
    """They would take 4 GiB; one head's take 64 MiB, and so does the gradient of the scores."""
    struct, (T, S) = jax.ShapeDtypeStruct, (4096, 4096)
    args = (
        struct((1, T, 64, 128), jnp.bfloat16),
        struct((1, T, 64), jnp.float32),
        struct((1, S, 128), jnp.bfloat16),
    )
    loss = lambda *args: jnp.sum(indexer_topk.scores(*args) ** 2)
    program = targets.compiled("v6e", jax.grad(loss, (0, 1, 2)), *args)
    assert targets.temporaries(program) <= 5 * 64 * 2**20


def test_reference_scores_match_the_formula() -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = whole_numbers(3, 1, 2, 3, 4, 9)
    dots = np.einsum("btij,bsj->btis", q_BTIJ, keys_LBSJ[0])
    expected = np.einsum("btis,bti->bts", np.maximum(dots, 0), weights_BTI)
    actual = reference.scores(*map(jnp.asarray, (q_BTIJ, weights_BTI, keys_LBSJ[0])))
    np.testing.assert_array_equal(actual, expected)
