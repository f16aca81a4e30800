"""Sizes of tiles, and loops over their parts inside a kernel.

Axis letters: K input channels, N output channels, L layers of a stack, B blocks of K, n of N.
"""

import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array, Shaped

from pallas_kernels.implementations import Unsupported
from pallas_kernels.products import contract

VMEM_BYTES = 56 * 2**20


def divisor(extent: int, most: int, unit: int) -> int:
    """The largest divisor of the extent that is a multiple of `unit`, up to `most`; or `unit`."""
    sizes = range(min(most, extent) // unit * unit, unit, -unit)
    return next((size for size in sizes if extent % size == 0), unit)


def channels(K: int, most: int) -> int:
    """Channels per tile: multiples of 1024, as scales are read in whole registers of eight rows."""
    if K % 1024 == 0:
        return divisor(K, most, 1024)
    if K <= 4096:
        return K
    raise Unsupported(f"The TPU form of linear takes K over 4096 in multiples of 1024, not {K}.")


def columns(N: int, most: int) -> int:
    """Columns per tile: a power of two; an even number of tiles, for chips of two cores."""
    if N <= 128:
        return N
    size = 2 ** int(math.log2(max(min(most, N // 2), 128)))
    while size > 128 and N % (2 * size):
        size //= 2
    return size if N % size == 0 else min(512, most)


def all_scales(scale_LBn: Shaped[Array, "L B n"]) -> pl.BlockSpec:
    """All scales of the layer, the last of the index map's arguments.

    They are too few for tiles; one index, so that they are read once.
    """
    return pl.BlockSpec((None, *scale_LBn.shape[1:]), lambda *at: (at[-1][0], 0, 0))


def over_chunks(bk: int, bn: int, run: Any) -> None:
    """Call `run(at_k, at_n, ck, cn)` for parts small enough to unroll."""
    ck, cn = 1024 if bk % 1024 == 0 else bk, bn if bn % 128 else divisor(bn, 512, 128)
    along_k, along_n = bk // ck, bn // cn
    # The start of a single part is static.
    start = lambda i, size, count: pl.multiple_of(i * size, size) if count > 1 else 0

    def body(i: Any, carry: None) -> None:
        at_k, at_n = jax.lax.rem(i, along_k), jax.lax.div(i, along_k)
        run(start(at_k, ck, along_k), start(at_n, cn, along_n), ck, cn)

    jax.lax.fori_loop(0, along_k * along_n, body, None)


def part_of(at: Any, multiple: int, by: int) -> Any:
    """`at / by`, where `at` is a multiple of `multiple`."""
    return at if isinstance(at, int) else pl.multiple_of(jax.lax.div(at, by), multiple // by)


def dot(x: Array, values: Array, precision: Any = None, *, transposed: bool = False) -> Array:
    """Rows times a matrix [K, N], or [N, K] if transposed, in x's dtype with float32 sums."""
    return contract(x, values.astype(x.dtype), 1, 1 if transposed else 0, precision)
