"""Benchmark cases of the kernels: Flash's and Pro's shapes, with inputs, bytes and flops.

Axis letters: as in the packages of `pallas_kernels`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
    compress,
    dense_attention,
    grouped_matmul,
    hyper,
    indexer_topk,
    quantize,
    rotary,
    sparse_attention,
)
from pallas_kernels.compress.shapes import SHAPES as COMPRESSORS
from pallas_kernels.dense_attention import inputs as dense
from pallas_kernels.dense_attention.shapes import SHAPES as DENSE
from pallas_kernels.grouped_matmul.inputs import Inputs
from pallas_kernels.grouped_matmul.shapes import SHAPES as EXPERTS
from pallas_kernels.indexer_topk.keys import FP4_BLOCK, to_fp4, to_fp8
from pallas_kernels.indexer_topk.shapes import SHAPES as INDEXER
from pallas_kernels.quantize.shapes import SHAPES as MATRICES
from pallas_kernels.rotary.shapes import SHAPES as HEADS
from pallas_kernels.sparse_attention import inputs as sparse
from pallas_kernels.sparse_attention.shapes import SHAPES as SPARSE

MODELS = ("flash", "pro")
_bf16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one set of inputs.

    Attributes:
      op: package and function, such as 'indexer_topk.select'.
      name: shape and sizes.
      run: the public function, with `impl` as a keyword.
      inputs: creates the arrays; `jax.eval_shape` of it gives their shapes for ahead-of-time
        compilation.
      bytes: minimum number of bytes read and written.
      flops: floating-point operations of the matrix products.
    """

    op: str
    name: str
    run: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    bytes: int
    flops: int


def cases(divide: int = 1) -> Iterator[Case]:
    """All cases, with sizes divided by `divide` to be feasible for the reference."""
    for model in MODELS:
        for tokens, rows, entries in ((1, 8, 262144), (512, 1, 32768)):
            yield _select(model, rows, tokens, entries // divide, divide)
            yield _sparse(model, rows, tokens, entries // divide, divide)
        # Entries of a million tokens.
        for key_dtype in ("fp8", "fp4"):
            yield _select(model, 8, 1, 262144 // divide, divide, key_dtype)
        for kind in ("hca", "csa", "index"):
            for tokens in (1, 8192):
                yield _compress(f"{model} {kind}", tokens, divide)
        for tokens, rows, entries in ((1, 8, 8192), (4096, 1, 8192)):
            yield _dense(model, rows, max(1, tokens // divide), entries // divide, divide)
        for tokens in (8, 4096):
            for weights in ("bf16", "fp8", "fp4"):
                yield _experts(model, tokens, weights, divide)
            for matrix in ("query", "output"):
                yield _linear(f"{model} {matrix}", tokens, divide)
            yield _hyper(model, tokens, divide)
        # Prefill first: TPUs run decode steps through XLA.
        for rows, tokens in ((1, 4096), (8, 1)):
            yield _rotate(model, rows, max(1, tokens // divide))


def _normal(*shape: int, dtype: Any = _bf16, seed: int = 0) -> Any:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def _whole(size: int, unit: int) -> int:
    """Round up to a multiple of `unit`: kernels take whole tiles, also in small cases."""
    return -(-size // unit) * unit


def _codes(*shape: int, dtype: Any) -> Any:
    """Random bits, drawn as bytes: floats would take four times the memory."""
    bits = jax.random.bits(jax.random.key(3), shape, jnp.uint8)
    return bits if dtype == jnp.uint8 else (bits & 0x77).view(dtype)


def _select(
    model: str, rows: int, tokens: int, entries: int, divide: int, key_dtype: str = "bf16"
) -> Case:
    """With `key_dtype` 'fp8' queries are FP8 too."""
    shape = INDEXER[model]
    heads, dim, k = shape.heads, shape.head_dim, max(1, shape.k // divide)
    width = {"bf16": 2 * dim, "fp8": dim + 1, "fp4": dim // 2 + dim // FP4_BLOCK}[key_dtype]
    encode = {"bf16": lambda keys: keys, "fp8": to_fp8, "fp4": to_fp4}[key_dtype]

    def inputs() -> tuple[Any, ...]:
        visible_BT = jnp.full((rows, tokens), entries, jnp.int32)
        keys = _normal(1, rows, entries, dim, seed=2)
        query_dtype = jnp.float8_e4m3fn if key_dtype == "fp8" else _bf16
        return (
            _normal(rows, tokens, heads, dim, dtype=query_dtype),
            _normal(rows, tokens, heads, dtype=jnp.float32, seed=1),
            encode(keys),
            jnp.int32(0),
            visible_BT,
        )

    return Case(
        op="indexer_topk.select",
        name=f"{model} {rows}x{tokens} queries, {entries} entries in {key_dtype}",
        run=functools.partial(indexer_topk.select, k=k),
        inputs=inputs,
        bytes=rows * entries * width,
        flops=2 * rows * tokens * entries * heads * dim,
    )


def _in_order(op: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """`op` with its arrays as positional arguments, in the order of the fields of `inputs`."""
    return lambda *arrays, **static: op(**inputs(*arrays)._asdict(), **static)


def _sparse(model: str, rows: int, tokens: int, entries: int, divide: int) -> Case:
    shape = SPARSE[model]
    heads, dim, k = shape.heads, shape.head_dim, max(1, shape.k // divide)

    def inputs() -> tuple[Any, ...]:
        chosen_Bk = jnp.arange(k, dtype=jnp.int32)[None] * (entries // k)
        indices_BTk = jnp.broadcast_to(chosen_Bk, (rows, tokens, k))
        pool = (_normal(1, rows, entries, dim, seed=2), jnp.int32(0), indices_BTk)
        sink_H = _normal(heads, dtype=jnp.float32, seed=4)
        if tokens == 1:
            mask_BTR = jnp.ones((rows, tokens, shape.window), bool)
            window = (_normal(rows, shape.window, dim, seed=1), mask_BTR)
        else:
            window = (
                _normal(rows, shape.window + tokens, dim, seed=1),
                jnp.full(rows, 4 * entries),
            )
        return (_normal(rows, tokens, heads, dim), *window, *pool, sink_H)

    run = _in_order(sparse_attention.decode, sparse.DecodeInputs)
    if tokens > 1:
        run = _in_order(sparse_attention.prefill, sparse.PrefillInputs)
        run = functools.partial(run, window=shape.window)
    keys = shape.window + k
    return Case(
        op=f"sparse_attention.{'decode' if tokens == 1 else 'prefill'}",
        name=f"{model} {rows}x{tokens} queries of {entries} entries",
        run=functools.partial(run, scale=dim**-0.5),
        inputs=inputs,
        bytes=2 * rows * tokens * dim * (2 * heads + k) + 2 * rows * dim * (shape.window + tokens),
        flops=4 * rows * tokens * heads * keys * dim,
    )


def _dense(model: str, rows: int, tokens: int, entries: int, divide: int) -> Case:
    shape = DENSE[model]
    heads, dim = max(1, shape.heads // divide), shape.head_dim

    def inputs() -> tuple[Any, ...]:
        visible_BT = jnp.full((rows, tokens), entries, jnp.int32)
        pool = (_normal(1, rows, entries, dim, seed=2), jnp.int32(0), visible_BT)
        sink_H = _normal(heads, dtype=jnp.float32, seed=4)
        if tokens == 1:
            mask_BTR = jnp.ones((rows, tokens, shape.window), bool)
            window = (_normal(rows, shape.window, dim, seed=1), mask_BTR)
        else:
            window = (
                _normal(rows, shape.window + tokens, dim, seed=1),
                jnp.full(rows, 128 * entries),
            )
        return (_normal(rows, tokens, heads, dim), *window, *pool, sink_H)

    run = _in_order(dense_attention.decode, dense.DecodeInputs)
    if tokens > 1:
        run = _in_order(dense_attention.prefill, dense.PrefillInputs)
        run = functools.partial(run, window=shape.window)
    return Case(
        op=f"dense_attention.{'decode' if tokens == 1 else 'prefill'}",
        name=f"{model} {rows}x{tokens} queries, {entries} entries",
        run=functools.partial(run, scale=dim**-0.5),
        inputs=inputs,
        bytes=2 * rows * dim * (2 * tokens * heads + shape.window + tokens + entries),
        flops=4 * rows * tokens * heads * (shape.window + entries) * dim,
    )


def _experts(model: str, tokens: int, weights: str, divide: int) -> Case:
    shape = EXPERTS[model].divided(divide)
    E, A = shape.experts, shape.choices
    D, F = _whole(shape.hidden, 256), _whole(shape.expert_hidden, 128)

    def inputs() -> tuple[Any, ...]:
        matrix = functools.partial(_weight, weights)
        scores_TE = jax.random.uniform(jax.random.key(5), (tokens, E))
        expert_TA = jax.lax.top_k(scores_TE, A)[1].astype(jnp.int32)
        weight_TA = jnp.full((tokens, A), 1 / A, jnp.float32)
        stacks = (matrix((1, E), F, D), matrix((1, E), F, D), matrix((1, E), D, F))
        return (_normal(tokens, D), expert_TA, weight_TA, *stacks, jnp.int32(0))

    used = min(E, round(E * (1 - (1 - A / E) ** tokens)))
    width = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5 + 1 / 32}[weights]
    return Case(
        op="grouped_matmul.expert_mlp",
        name=f"{model} {weights}, {tokens} tokens",
        run=functools.partial(
            _in_order(grouped_matmul.expert_mlp, Inputs), limit=10.0, weight_first=True
        ),
        inputs=inputs,
        bytes=int(used * 3 * F * D * width) + tokens * D * 6,
        flops=2 * tokens * A * 3 * F * D,
    )


def _weight(kind: str, stack: tuple[int, ...], n: int, k: int) -> Any:
    if kind == "bf16":
        return _normal(*stack, n, k) * 0.02
    scale = lambda *shape: jnp.full((*stack, *shape), 2.0**-6).astype(jnp.float8_e8m0fnu)
    if kind == "fp8":
        codes = _codes(*stack, k, n, dtype=jnp.float8_e4m3fn)
        return quantize.Fp8Weight(codes, scale(math.ceil(k / 128), math.ceil(n / 128)))
    return quantize.Fp4Weight(_codes(*stack, k // 2, n, dtype=jnp.uint8), scale(k // 32, n))


def _linear(matrix: str, tokens: int, divide: int) -> Case:
    shape = MATRICES[matrix].divided(divide)
    n, k = _whole(shape.n, 128), _whole(shape.k, 128)
    return Case(
        op="quantize.linear",
        name=f"{matrix} fp8, {tokens} tokens",
        run=quantize.linear,
        inputs=lambda: (_normal(tokens, k), _weight("fp8", (), n, k)),
        bytes=n * k + 2 * tokens * (n + k),
        flops=2 * tokens * n * k,
    )


def _compress(name: str, tokens: int, divide: int) -> Case:
    """Decode of eight rows, or a prompt.

    Small cases are not rounded: a rounding step would exceed the tolerance without being an error.
    """
    shape, step = COMPRESSORS[name], tokens == 1
    M, C, K, overlap = shape.ratio, shape.channels, shape.dim, shape.overlap
    rows, tokens = (8, 1) if step else (1, max(2 * M, tokens // divide))
    entries = -(-tokens // M)

    def inputs() -> tuple[Any, ...]:
        angle_BnQ = _normal(rows, entries, shape.rotated // 2, dtype=jnp.float32, seed=3)
        bias_MC, scale_K = _normal(M, C, dtype=jnp.float32, seed=4), 1 + _normal(K, seed=5) / 8
        rest = (bias_MC, scale_K, (jnp.cos(angle_BnQ), jnp.sin(angle_BnQ)))
        draw = functools.partial(_normal, dtype=jnp.float32)
        if step:
            ring_LBRC = draw(1, rows, shape.ring, 2 * C)
            return (ring_LBRC, jnp.int32(0), jnp.arange(rows, dtype=jnp.int32), *rest)
        before_BPC = draw(rows, overlap * M, 2 * C, seed=1)
        return (draw(rows, tokens, 2 * C), before_BPC, jnp.zeros(rows, jnp.int32), *rest)

    return Case(
        op=f"compress.{'decode' if step else 'prefill'}",
        name=f"{name}, {rows}x{tokens} tokens",
        run=functools.partial(
            compress.decode if step else compress.prefill,
            overlap=overlap,
            eps=1e-6,
            rounding=shape.rounding if divide == 1 else "none",
            dtype=_bf16,
        ),
        inputs=inputs,
        # A decode step reads K of each token's C channels: those of one series.
        bytes=rows * (8 * K * overlap * M if step else 8 * C * tokens) + 2 * rows * entries * K,
        flops=0,
    )


def _hyper(model: str, tokens: int, divide: int) -> Case:
    hidden, streams = EXPERTS[model].divided(divide).hidden, 4
    mixes = 2 * streams + streams**2

    def inputs() -> tuple[Any, ...]:
        return (
            _normal(1, tokens, streams * hidden),
            _normal(mixes, streams * hidden, dtype=jnp.float32),
            jnp.zeros(mixes, jnp.float32),
            jnp.ones(3, jnp.float32),
        )

    return Case(
        op="hyper.pre",
        name=f"{model}, {tokens} tokens",
        run=functools.partial(hyper.pre, streams=streams, steps=20, eps=1e-6, norm_eps=1e-6),
        inputs=inputs,
        bytes=tokens * hidden * (2 * streams + 2) + 4 * mixes * streams * hidden,
        flops=2 * tokens * mixes * streams * hidden,
    )


def _rotate(model: str, rows: int, tokens: int) -> Case:
    """Queries of attention, normed before rotation."""
    shape = HEADS[model]
    heads, dim, pairs = shape.heads, shape.dim, shape.rotated // 2

    def inputs() -> tuple[Any, ...]:
        angle_BTQ = _normal(rows, tokens, pairs, dtype=jnp.float32, seed=1)
        return (_normal(rows, tokens, heads, dim), jnp.cos(angle_BTQ), jnp.sin(angle_BTQ))

    return Case(
        op="rotary.rotate",
        name=f"{model}, {rows}x{tokens} tokens",
        run=functools.partial(rotary.rotate, norm=rotary.Norm(1e-6, float32=False)),
        inputs=inputs,
        bytes=rows * tokens * (2 * 2 * heads * dim + 2 * 4 * pairs),
        flops=0,
    )
