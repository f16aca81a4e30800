"""Every op on random shapes: values and gradients equal those of the plain maths.

The implementation is XLA's. Where that is the reference itself, it is compared with float64 NumPy,
and its gradients are JAX's.

Axis letters: as in the packages.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compress, dense_attention, hyper, indexer_topk, quantize, rotary
from pallas_kernels.compress.shapes import Shape as Compressor
from pallas_kernels.dense_attention import reference as plain_attention
from pallas_kernels.dense_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.grouped_matmul.shapes import Shape as Experts
from tests import (
    test_compress,
    test_dense_attention,
    test_dense_attention_gradients,
    test_grouped_matmul,
    test_grouped_matmul_gradients,
    test_indexer_topk,
    test_layers,
    test_quantize,
    test_sparse_attention,
    test_sparse_attention_gradients,
)
from tests.kernels import by_name

FEW = settings(deadline=None, max_examples=3)  # each shape compiles a program
MANY = settings(deadline=None, max_examples=6)
SEED = st.integers(0, 2**32 - 1)
UP_TO = functools.partial(st.integers, 1)
STARTS = st.lists(st.integers(0, 300), min_size=1, max_size=3).map(tuple)
# A few dozen successive float32 roundings.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def normal(seed: int, *dims: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=dims), jnp.float32)


def assert_attention(case: Any, **static: Any) -> None:
    name, record = ("prefill", PrefillInputs) if static else ("decode", DecodeInputs)
    np.testing.assert_allclose(case.run("xla"), case.expected(), **test_dense_attention.CLOSE)
    dense, static = test_dense_attention_gradients, static | {"scale": test_dense_attention.SCALE}
    got, want = (
        dense.gradients(functools.partial(run, **static), case)
        for run in (
            functools.partial(getattr(dense_attention, name), impl="xla"),
            by_name(getattr(plain_attention, name), record),
        )
    )
    for array, x in want.items():
        np.testing.assert_allclose(got[array], x, **dense.CLOSE, err_msg=array)


@FEW
@given(B=UP_TO(3), T=UP_TO(4), R=UP_TO(20), S=st.integers(0, 40), H=UP_TO(5), K=UP_TO(9), seed=SEED)
def test_dense_attention_decode(**sizes: int) -> None:
    assert_attention(test_dense_attention.decode_case(**sizes))


@FEW
@given(
    starts=STARTS,
    T=UP_TO(20),
    window=UP_TO(12),
    S=st.integers(0, 80),
    H=UP_TO(5),
    K=UP_TO(9),
    seed=SEED,
)
def test_dense_attention_prefill(starts: tuple[int, ...], window: int, **sizes: int) -> None:
    case = test_dense_attention.prefill_case(starts, window=window, **sizes)
    assert_attention(case, window=window)


@FEW
@given(B=UP_TO(3), T=UP_TO(4), R=UP_TO(20), S=UP_TO(40), k=UP_TO(50), seed=SEED)
def test_sparse_attention_decode(**sizes: int) -> None:
    inputs = test_sparse_attention.decode_inputs(**sizes)
    test_sparse_attention.check_decode(inputs, "xla")
    test_sparse_attention_gradients.check(inputs, "xla")


@FEW
@given(
    starts=STARTS,
    T=UP_TO(20),
    window=UP_TO(12),
    S=UP_TO(80),
    k=UP_TO(90),
    H=UP_TO(5),
    K=UP_TO(9),
    seed=SEED,
)
def test_sparse_attention_prefill(starts: tuple[int, ...], **sizes: int) -> None:
    inputs = test_sparse_attention.prefill_inputs(starts, **sizes)
    test_sparse_attention.check_prefill(inputs, "xla")
    test_sparse_attention_gradients.check(inputs, "xla")


@MANY
@given(data=st.data(), B=UP_TO(3), T=UP_TO(5), I=UP_TO(4), J=UP_TO(9), S=UP_TO(700), k=UP_TO(90))
def test_indexer_selection(data: st.DataObject, k: int, **sizes: int) -> None:
    case = test_indexer_topk.whole_numbers(data.draw(SEED), **sizes)
    rng = np.random.default_rng(data.draw(SEED))
    visible_BT = rng.integers(0, sizes["S"] + 1, (sizes["B"], sizes["T"]))
    test_indexer_topk.check(case, visible_BT, k, "xla", layer=1)


@FEW
@given(B=UP_TO(3), T=UP_TO(5), I=UP_TO(4), J=UP_TO(9), S=UP_TO(70), seed=SEED)
def test_indexer_scores(B: int, T: int, I: int, J: int, S: int, seed: int) -> None:
    args = normal(seed, B, T, I, J), normal(seed + 1, B, T, I), normal(seed + 2, B, S, J)
    grad_BTS = normal(seed + 3, B, T, S)

    def scores_and_gradients(impl: Any) -> Any:
        score_BTS, pull = jax.vjp(functools.partial(indexer_topk.scores, impl=impl), *args)
        return score_BTS, pull(grad_BTS)

    # Float32 sums of up to 70 products of size 1 to 10, in another order.
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-5)
    jax.tree.map(compare, scores_and_gradients("xla"), scores_and_gradients("reference"))


@FEW
@given(data=st.data(), E=UP_TO(6), F=UP_TO(4), D=UP_TO(4), tokens=UP_TO(60))
def test_routed_experts(data: st.DataObject, E: int, F: int, D: int, tokens: int) -> None:
    A = data.draw(UP_TO(E))
    shape = Experts(experts=E, choices=A, hidden=32 * D, expert_hidden=32 * F)
    form = data.draw(st.sampled_from(["float32", "fp8", "fp4"]))
    args = test_grouped_matmul_gradients.arguments(form, tokens, shape)
    test_grouped_matmul.assert_close(
        test_grouped_matmul.run(args, "xla"), test_grouped_matmul.expected(args)
    )
    test_grouped_matmul_gradients.assert_same_gradients(args)


@MANY
@given(
    form=st.sampled_from(["fp8", "fp4", "dense"]),
    G=UP_TO(3),
    D=UP_TO(140),
    K=UP_TO(9),
    rows=UP_TO(90),
)
def test_matmul_with_a_quantised_weight(form: str, G: int, D: int, K: int, rows: int) -> None:
    stack, w_NK, x = test_quantize.stack_and_rows(form, G, G * D, 32 * K, rows, jnp.float32)
    y, pull = jax.vjp(
        lambda x: quantize.linear(x, stack, layer=jnp.int32(2), groups=G, impl="xla"), x
    )
    by_group, close = test_quantize.by_group, test_quantize.CLOSE
    limit = close * by_group(np.abs(x), np.abs(w_NK), G)
    assert np.all(np.abs(y - by_group(x, w_NK, G)) <= limit)
    dy_RGD, w_GDK = normal(K, rows, G, D), w_NK.reshape(G, D, -1)
    back = lambda dy, w: np.einsum("rgd,gdk->rgk", dy, w).reshape(rows, -1)
    limit = close * back(np.abs(dy_RGD), np.abs(w_GDK))
    (dx,) = pull(dy_RGD.reshape(rows, -1))
    assert np.all(np.abs(dx - back(dy_RGD, w_GDK)) <= limit)


@MANY
@given(st.sampled_from(["fp8", "fp4"]), UP_TO(9), UP_TO(150), UP_TO(70), SEED)
def test_rounding(form: str, rows: int, channels: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = np.exp2(rng.integers(-30, 30, (rows, channels)))
    x = (rng.standard_normal(size.shape) * size).astype(np.float32)
    want = test_quantize.expected(x, form, block)
    test_quantize.assert_same_bits(test_quantize.fake_quant(x, form, block), want)


@FEW
@given(
    data=st.data(),
    overlap=UP_TO(2),
    ratio=UP_TO(9),
    half=st.integers(4, 12),
    T=UP_TO(60),
    seed=SEED,
)
def test_compression(
    data: st.DataObject, overlap: int, ratio: int, half: int, T: int, seed: int
) -> None:
    rotated = 2 * data.draw(UP_TO(half))
    shape = Compressor(ratio, dim=2 * half, overlap=overlap, rotated=rotated, rounding="none")
    text, static = test_compress.text(shape, 2, T, seed=seed), test_compress.settings(shape)
    want_BnK, start = test_compress.plain(shape, text), data.draw(st.integers(0, T - 1))
    args = test_compress.chunk(shape, text, [start, start], T - start, poison=np.nan)
    got_BnK = compress.prefill(*args, **static, impl="xla")
    want = want_BnK[:, start // ratio :]
    np.testing.assert_allclose(got_BnK[:, : want.shape[1]], want, **CLOSE)
    if len(want_BnK[0]):
        window_B = [data.draw(st.integers(0, T // ratio - 1)) for _ in range(2)]
        got_B1K = compress.decode(*test_compress.steps(shape, text, window_B), **static, impl="xla")
        np.testing.assert_allclose(got_B1K[:, 0], want_BnK[[0, 1], window_B], **CLOSE)


@MANY
@given(B=UP_TO(3), T=UP_TO(5), H=UP_TO(4), straight=st.integers(0, 5), Q=UP_TO(6), seed=SEED)
def test_rotation(B: int, T: int, H: int, straight: int, Q: int, seed: int) -> None:
    x_BTHK = normal(seed, B, T, H, straight + 2 * Q)
    angle_BTQ = np.random.default_rng(seed).uniform(0, 7, (B, T, Q)).astype(np.float32)
    norm = rotary.Norm(1e-6, float32=True)
    got_BTHK = rotary.rotate(x_BTHK, jnp.cos(angle_BTQ), jnp.sin(angle_BTQ), norm=norm)
    wide = np.asarray(x_BTHK, np.float64)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    pairs = wide[..., straight:].reshape(B, T, H, Q, 2) @ [1, 1j]
    pairs = pairs * np.exp(1j * angle_BTQ.astype(np.float64))[:, :, None]
    rotated = np.stack([pairs.real, pairs.imag], -1).reshape(B, T, H, 2 * Q)
    np.testing.assert_allclose(got_BTHK[..., :straight], wide[..., :straight], **CLOSE)
    np.testing.assert_allclose(got_BTHK[..., straight:], rotated, **CLOSE)


@FEW
@given(B=UP_TO(3), T=UP_TO(5), N=UP_TO(5), D=UP_TO(9), steps=UP_TO(6), seed=SEED)
def test_hyper_connections(B: int, T: int, N: int, D: int, steps: int, seed: int) -> None:
    M, Q = N * D, N * (2 + N)
    x, output = normal(seed, B, T, M), normal(seed + 1, B, T, D)
    # Logits of a few units.
    fn, base, scale = normal(seed + 2, Q, M) * M**-0.5, normal(seed + 3, Q), normal(seed + 4, 3)
    wide = functools.partial(np.asarray, dtype=np.float64)
    eps: dict[str, Any] = {"eps": 1e-6, "norm_eps": 1e-5}
    mixes = wide(x) @ wide(fn).T / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-5)
    parts = np.split(mixes, [N, 2 * N], axis=-1), np.split(wide(base), [N, 2 * N])
    first, second, third = (m * s + b for m, b, s in zip(*parts, wide(scale), strict=True))
    weight, post = 1 / (1 + np.exp(-first)) + 1e-6, 2 / (1 + np.exp(-second))
    comb = test_layers.plain_sinkhorn(third.reshape(B, T, N, N), steps, 1e-6)
    streams = wide(x).reshape(B, T, N, D)
    want = (np.einsum("btn,btnd->btd", weight, streams), post, comb)
    got = hyper.pre(x, fn, base, scale, streams=N, steps=steps, **eps)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    head = hyper.head(x, fn[:N], base[:N], scale[:1], **eps)
    np.testing.assert_allclose(head, want[0], rtol=1e-4, atol=1e-5)
    new = post[..., None] * wide(output)[:, :, None] + np.einsum("btjk,btjd->btkd", comb, streams)
    got = hyper.post(output, x, jnp.asarray(post, jnp.float32), jnp.asarray(comb, jnp.float32))
    np.testing.assert_allclose(got, new.reshape(B, T, M), **CLOSE)
