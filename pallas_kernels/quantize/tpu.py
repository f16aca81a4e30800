"""Matmuls with quantised weights on TPUs: the codes become numbers in VMEM, tile by tile.

Few rows are bound by reading the codes: the products of each block are multiplied by its scale,
not the weights. Many rows dequantise each tile once and reuse it for all of them.

Axis letters: R rows, K input channels, N output channels, B blocks of K.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.implementations import Unsupported
from pallas_kernels.quantize import tpu_codes
from pallas_kernels.quantize.leaves import FP4_BLOCK, FP8_BLOCK, Fp4Weight, Fp8Weight, Weight

_FEW = {Fp8Weight: 128, Fp4Weight: 16}  # rows up to which products are scaled
_TILE_BYTES = 2**21  # of codes: a microsecond or two of HBM time, so that latency is hidden
_DENSE_BYTES = 32 * 2**20  # of dequantised weights kept in VMEM
_VMEM_BYTES = 56 * 2**20


def linear(
    x: Float[Array, "*rows K"], w: Weight, *, precision: jax.lax.PrecisionLike = None
) -> Float[Array, "*rows N"]:
    """As `quantize.linear`, for quantised weights.

    Raises:
      Unsupported: another kind of weight, dtype, or K.
    """
    w = _checked(x, w)
    x_RK = x.reshape(-1, x.shape[-1])
    few = len(x_RK) <= _FEW[type(w)]
    y_RN = (_few if few else functools.partial(_many, transposed=False))(x_RK, w, precision)
    return y_RN.reshape(*x.shape[:-1], w.codes.shape[1])


def linear_backward(
    dy: Float[Array, "*rows N"], w: Weight, *, precision: jax.lax.PrecisionLike = None
) -> Float[Array, "*rows K"]:
    """As `xla.linear_backward`, for quantised weights.

    Raises:
      Unsupported: another kind of weight, dtype, K or N.
    """
    w = _checked(dy, w)
    N, K = w.shape
    if N % 128:
        raise Unsupported(f"The TPU form of linear_backward takes N in 128s, not {N}.")
    dx_RK = _many(dy.reshape(-1, N), w, precision, transposed=True)
    return dx_RK.reshape(*dy.shape[:-1], K)


def _checked(x: Array, w: Weight) -> Fp8Weight | Fp4Weight:
    if not isinstance(w, Fp8Weight | Fp4Weight):
        raise Unsupported("The TPU form of linear takes Fp8Weight and Fp4Weight, not arrays.")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(f"The TPU form of linear takes bfloat16 and float32, not {x.dtype}.")
    if w.codes.ndim != 2 or x.size == 0:
        raise Unsupported(f"The TPU form of linear takes one matrix and rows; got {w.codes.shape}.")
    K = w.shape[1]
    if K % 256 and not (K % 128 == 0 and isinstance(w, Fp8Weight)):
        raise Unsupported(f"The TPU form of linear takes K in 128s (FP8) or 256s (FP4), not {K}.")
    tpu_codes.refuse_partitioning()
    return w


def _divisor(extent: int, most: int, unit: int) -> int:
    """The largest divisor of the extent up to `most` that counts whole units; or one unit."""
    sizes = range(min(most, extent) // unit * unit, unit, -unit)
    return next((size for size in sizes if extent % size == 0), unit)


def _along_k(K: int, most: int) -> int:
    """Channels per tile: whole thousands, because scales are read in whole tiles of eight rows."""
    if K % 1024 == 0:
        return _divisor(K, most, 1024)
    if K <= 4096:
        return K
    raise Unsupported(f"The TPU form of linear takes K over 4096 in 1024s, not {K}.")


def _own_k(w: Fp8Weight | Fp4Weight, most: int) -> int:
    """Channels whose weights for all of N are kept dequantised, at most so many numbers."""
    N, K = w.shape
    size = _divisor(K, min(1024, most // N), 128)
    if size * N > most or (isinstance(w, Fp4Weight) and size % 1024 and size != K):
        raise Unsupported(f"The TPU form of linear_backward does not take a matrix of {N} x {K}.")
    return size


def _columns(N: int, most: int) -> int:
    """A power of two of columns per tile; an even number of tiles, for chips of two cores."""
    if N <= 128:
        return N
    size = 2 ** int(math.log2(max(min(most, N // 2), 128)))
    while size > 128 and N % (2 * size):
        size //= 2
    return size if N % size == 0 else min(512, most)


def _few(
    x_RK: Float[Array, "R K"], w: Fp8Weight | Fp4Weight, precision: jax.lax.PrecisionLike
) -> Float[Array, "R N"]:
    (R, K), N = x_RK.shape, w.codes.shape[1]
    packed = K // w.codes.shape[0]
    bn = _columns(N, 2048)
    bk = _along_k(K, max(_TILE_BYTES * packed // bn, 1024))
    rows = -(-R // 8) * 8
    fp8 = isinstance(w, Fp8Weight)
    kernel = _fp8_products if fp8 else _fp4_products
    scale_spec = pl.BlockSpec(w.scale.shape, lambda n, k: (0, 0))
    if not fp8:
        scale_spec = pl.BlockSpec((bk // FP4_BLOCK, bn), lambda n, k: (k, n))
    own = pltpu.VMEM((bk // FP8_BLOCK, rows * FP8_BLOCK // FP4_BLOCK, FP8_BLOCK), x_RK.dtype)
    scratch = [pltpu.VMEM((rows, bn), jnp.float32)]
    scratch.append(pltpu.VMEM(w.scale.shape, jnp.float32) if fp8 else own)
    return pl.pallas_call(
        functools.partial(kernel, precision=precision, keeps=tpu_codes.keeps_e4m3()),
        grid=(pl.cdiv(N, bn), K // bk),
        in_specs=[
            pl.BlockSpec((rows, bk), lambda n, k: (0, k)),
            pl.BlockSpec((bk // packed, bn), lambda n, k: (k, n)),
            scale_spec,
        ],
        out_specs=pl.BlockSpec((rows, bn), lambda n, k: (0, n)),
        out_shape=jax.ShapeDtypeStruct((R, N), x_RK.dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        name="linear_few_rows",
    )(x_RK, w.codes, w.scale)


def _over_chunks(bk: int, bn: int, run: Any) -> None:
    """`run(at_k, at_n, ck, cn)` for parts small enough to unroll; one part's start is static."""
    ck, cn = 1024 if bk % 1024 == 0 else bk, bn if bn % 128 else _divisor(bn, 512, 128)
    along_k, along_n = bk // ck, bn // cn
    start = lambda i, size, count: pl.multiple_of(i * size, size) if count > 1 else 0

    def body(i: Any, carry: None) -> None:
        at_k, at_n = jax.lax.rem(i, along_k), jax.lax.div(i, along_k)
        run(start(at_k, ck, along_k), start(at_n, cn, along_n), ck, cn)

    jax.lax.fori_loop(0, along_k * along_n, body, None)


def _part(at: Any, multiple: int, by: int) -> Any:
    """`at / by`, where `at` counts whole multiples."""
    return at if isinstance(at, int) else pl.multiple_of(jax.lax.div(at, by), multiple // by)


def _fp8_products(
    x_ref: Any,  # [R, bk]
    codes_ref: Any,  # [bk, bn]
    scale_ref: Any,  # [B, N / 128]
    out_ref: Any,  # [R, bn]
    sum_ref: Any,  # [R, bn] float32
    wide_ref: Any,  # [B, N / 128] float32
    *,
    precision: Any,
    keeps: bool,
) -> None:
    n, k = pl.program_id(0), pl.program_id(1)
    bk, bn = codes_ref.shape

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        unit = tpu_codes.e4m3_unit(keeps)
        wide_ref[...] = tpu_codes.scale_values(scale_ref[...]) * unit

    def chunk(at_k: Any, at_n: Any, ck: int, cn: int) -> None:
        blocks = ck // FP8_BLOCK
        block = _part(k * bk + at_k, ck, FP8_BLOCK) if wide_ref.shape[0] > blocks else 0
        scale = wide_ref[pl.ds(block, blocks), :]
        scale = tpu_codes.spread(scale, jax.lax.div(n * bn + at_n, FP8_BLOCK), cn)
        total = sum_ref[:, pl.ds(at_n, cn)]
        for b in range(blocks):
            at = pl.ds(at_k + b * FP8_BLOCK, FP8_BLOCK)
            values = tpu_codes.e4m3_values(codes_ref[at, pl.ds(at_n, cn)], keeps)
            total += _dot(x_ref[:, at], values, precision) * scale[b : b + 1]
        sum_ref[:, pl.ds(at_n, cn)] = total

    _over_chunks(bk, bn, chunk)

    @pl.when(k == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _dot(x: Array, values: Array, precision: Any, *, transposed: bool = False) -> Array:
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(
        x, values.astype(x.dtype), dims, precision=precision, preferred_element_type=jnp.float32
    )


def _fp4_products(
    x_ref: Any,  # [R, bk]
    codes_ref: Any,  # [bk / 2, bn]
    scale_ref: Any,  # [bk / 32, bn]
    out_ref: Any,  # [R, bn]
    sum_ref: Any,  # [R, bn] float32
    apart_ref: Any,  # [bk / 128, 4 * R, 128]
    *,
    precision: Any,
    keeps: bool,
) -> None:
    """The rows are repeated per block of 32, zero in other blocks: one product sums each apart."""
    del keeps
    k = pl.program_id(1)
    R, bk = x_ref.shape
    bn = codes_ref.shape[1]
    group = FP8_BLOCK // FP4_BLOCK  # blocks of one product

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for g in range(bk // FP8_BLOCK):
        # In float32, whose layout does not depend on the number of rows.
        x = x_ref[:, g * FP8_BLOCK : (g + 1) * FP8_BLOCK].astype(jnp.float32)
        block = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1), FP4_BLOCK)
        apart = [jnp.where(block == i, x, jnp.zeros_like(x)) for i in range(group)]
        apart_ref[g] = jnp.concatenate(apart).astype(x_ref.dtype)

    def chunk(at_k: Any, at_n: Any, ck: int, cn: int) -> None:
        blocks = ck // FP4_BLOCK
        scale = scale_ref[pl.ds(_part(at_k, ck, FP4_BLOCK), blocks), pl.ds(at_n, cn)]
        scale = tpu_codes.scale_values(scale) * tpu_codes.E2M1_UNIT
        total = sum_ref[:, pl.ds(at_n, cn)]
        for b in range(ck // FP8_BLOCK):
            at = _part(at_k, ck, 2) + b * FP8_BLOCK // 2
            values = tpu_codes.e2m1_values(codes_ref[pl.ds(at, FP8_BLOCK // 2), pl.ds(at_n, cn)])
            products = _dot(apart_ref[_part(at_k, ck, FP8_BLOCK) + b], values, precision)
            for i in range(group):
                row = b * group + i
                total += products[i * R : (i + 1) * R] * scale[row : row + 1]
        sum_ref[:, pl.ds(at_n, cn)] = total

    _over_chunks(bk, bn, chunk)

    @pl.when(k == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _many(
    x_RI: Float[Array, "R I"],
    w: Fp8Weight | Fp4Weight,
    precision: jax.lax.PrecisionLike,
    *,
    transposed: bool,
) -> Float[Array, "R O"]:
    """Sums over K, or over N if `transposed`; the other dim is the outermost of the grid."""
    (R, _), (N, K) = x_RI.shape, w.shape
    packed = K // w.codes.shape[0]
    most = _DENSE_BYTES // x_RI.dtype.itemsize
    if transposed:
        bk, bn = _own_k(w, most), _divisor(N, 1024, 128)
        outer, inner, out_size, block = K // bk, N // bn, K, bk
    else:
        bk, bn = _along_k(K, 1024), _columns(N, min(1024, most // K))
        outer, inner, out_size, block = pl.cdiv(N, bn), K // bk, N, bn
    bm = min(512, -(-R // 16) * 16)
    wide = (8, 128)  # nothing
    if isinstance(w, Fp8Weight):
        wide = (bk // FP8_BLOCK, w.scale.shape[1]) if transposed else w.scale.shape

    def tile(o: Any, m: Any, i: Any) -> tuple[Any, Any]:
        # The tiles are read for the first rows; then the last one stays.
        i = jnp.where(m == 0, i, inner - 1)
        return (o, i) if transposed else (i, o)

    scale_spec = pl.BlockSpec(w.scale.shape, lambda o, m, i: (0, 0))
    if isinstance(w, Fp4Weight):
        scale_spec = pl.BlockSpec((bk // FP4_BLOCK, bn), tile)
    scratch = [
        pltpu.VMEM((bm, block), jnp.float32),
        pltpu.VMEM((inner, bk, bn), x_RI.dtype),
        pltpu.VMEM(wide, jnp.float32),
    ]
    kernel = functools.partial(
        _dense_tiles,
        dequantise=_dequantise_fp8 if isinstance(w, Fp8Weight) else _dequantise_fp4,
        precision=precision,
        transposed=transposed,
        keeps=tpu_codes.keeps_e4m3(),
    )
    return pl.pallas_call(
        kernel,
        grid=(outer, pl.cdiv(R, bm), inner),
        in_specs=[
            pl.BlockSpec((bm, bn if transposed else bk), lambda o, m, i: (m, i)),
            pl.BlockSpec((bk // packed, bn), tile),
            scale_spec,
        ],
        out_specs=pl.BlockSpec((bm, block), lambda o, m, i: (m, o)),
        out_shape=jax.ShapeDtypeStruct((R, out_size), x_RI.dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        name="linear_backward" if transposed else "linear_many_rows",
    )(x_RI, w.codes, w.scale)


def _dense_tiles(
    x_ref: Any,  # [bm, bk], or [bm, bn] if transposed
    codes_ref: Any,  # [bk or bk / 2, bn]
    scale_ref: Any,  # FP8: [B, N / 128]; FP4: [bk / 32, bn]
    out_ref: Any,  # [bm, bn], or [bm, bk]
    sum_ref: Any,  # the same, float32
    dense_ref: Any,  # [tiles along the sum, bk, bn]
    wide_ref: Any,  # FP8: the scales in float32
    *,
    dequantise: Any,
    precision: Any,
    transposed: bool,
    keeps: bool,
) -> None:
    o, m, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dense = dense_ref.at[i]

    @pl.when(m == 0)
    def _():
        k, n = (o, i) if transposed else (i, o)
        dequantise(codes_ref, scale_ref, wide_ref, dense, k=k, n=n, keeps=keeps)

    @pl.when(i == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += _dot(x_ref[...], dense[...], precision, transposed=transposed)

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _dequantise_fp8(
    codes_ref: Any, scale_ref: Any, wide_ref: Any, dense: Any, *, k: Any, n: Any, keeps: bool
) -> None:
    bk, bn = codes_ref.shape

    rows = wide_ref.shape[0]
    own = rows != scale_ref.shape[0]  # k is the outermost: it needs its own rows only

    @pl.when(pl.program_id(2) == 0)
    def _():
        scale = tpu_codes.scale_values(scale_ref[...]) * tpu_codes.e4m3_unit(keeps)
        wide_ref[...] = tpu_codes.rows(scale, k * rows, rows) if own else scale

    def chunk(at_k: Any, at_n: Any, ck: int, cn: int) -> None:
        blocks = ck // FP8_BLOCK
        first = _part(at_k if own else k * bk + at_k, ck, FP8_BLOCK) if rows > blocks else 0
        scale = tpu_codes.spread(
            wide_ref[pl.ds(first, blocks), :], jax.lax.div(n * bn + at_n, FP8_BLOCK), cn
        )
        for b in range(blocks):
            at = (pl.ds(at_k + b * FP8_BLOCK, FP8_BLOCK), pl.ds(at_n, cn))
            values = tpu_codes.e4m3_values(codes_ref[at], keeps).astype(jnp.float32)
            dense[at] = (values * scale[b : b + 1]).astype(dense.dtype)

    _over_chunks(bk, bn, chunk)


def _dequantise_fp4(
    codes_ref: Any, scale_ref: Any, wide_ref: Any, dense: Any, *, k: Any, n: Any, keeps: bool
) -> None:
    del wide_ref, k, n, keeps
    bk, bn = dense.shape

    def chunk(at_k: Any, at_n: Any, ck: int, cn: int) -> None:
        blocks = ck // FP4_BLOCK
        scale = scale_ref[pl.ds(_part(at_k, ck, FP4_BLOCK), blocks), pl.ds(at_n, cn)]
        # Powers of two are exact in bfloat16.
        scale = (tpu_codes.scale_values(scale) * tpu_codes.E2M1_UNIT).astype(jnp.bfloat16)
        for b in range(ck // FP8_BLOCK):
            at = _part(at_k, ck, 2) + b * FP8_BLOCK // 2
            values = tpu_codes.e2m1_values(codes_ref[pl.ds(at, FP8_BLOCK // 2), pl.ds(at_n, cn)])
            for i in range(FP8_BLOCK // FP4_BLOCK):
                row = b * FP8_BLOCK // FP4_BLOCK + i
                part = values[i * FP4_BLOCK : (i + 1) * FP4_BLOCK] * scale[row : row + 1]
                to = (pl.ds(at_k + row * FP4_BLOCK, FP4_BLOCK), pl.ds(at_n, cn))
                dense[to] = part.astype(dense.dtype)

    _over_chunks(bk, bn, chunk)
