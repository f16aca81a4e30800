"""Exact top k of one query inside a TPU kernel: no sort, no scatter, no list of scores in HBM.

Scores are int32 keys in VMEM that sort like them, entry s at row s // 128, lane s % 128. Bisection
on the key, by counting, finds the k-th largest; bisection on the index finds which of its equals
are chosen. The list is built by rank: slot p finds the row, then the lane, at which the running
count of chosen entries exceeds p. All look-ups are products with one-hot matrices.

Example with k = 4, two rows of 4 lanes instead of 128, and one peak per lane:

    entry            0  1  2  3   4  5  6  7
    key              5  9  2  7   7  1  8  7       row 0, then row 1
    peaks            7  9  8  7                    largest key of each lane

    `cut`            The 4th largest peak, 7, is a lower bound of the 4th largest key. 5 keys are
                     7 or more, only 2 are 8 or more: the 4th largest key is 7, and 4 - 2 = 2 of
                     the three 7s are chosen, those up to entry 4. Returns (7, 4).
    `mark`           0  1  0  1   1  0  1  0       chosen: above 7, or 7 and at most entry 4
    counts           2            2                chosen per row; running: 2, 4

    `listed`: slot   0  1  2  3
    row              0  0  1  1                    how many running counts are <= slot
    rank             0  1  0  1                    slot - chosen in the rows before
    lane             1  3  0  2                    how many running counts of the row (0 1 1 2 in
                                                   row 0, 1 1 2 2 in row 1) are <= rank
    entry            1  3  4  6                    row * 4 + lane

Axis letters: R rows of 128 entries, G groups of 128 rows, P slots of the list (k, rounded up to a
multiple of 128), L 128 lanes: of entries, or of a group's rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.products import contract

# Below the key of every number and NaN: marks a missing entry.
NOTHING = -(2**31)
# Above every index: chooses all equal keys.
_MANY = 2**31 - 1
# Rows per step of the loops over the keys.
_STEP = 512
# As many groups as lanes, so that a vector has one number per group.
MOST_ROWS = LANES * LANES

Hits = Callable[[Int32[Array, "step 128"], Int32[Array, ""]], Bool[Array, "step 128"]]


def padded_rows(rows: int) -> int:
    """Rows to allocate, so that loops over them take full steps."""
    return rows if rows <= LANES else pl.cdiv(rows, _STEP) * _STEP


def choose(
    keys_ref: Any,
    peaks_ref: Any,
    chosen_ref: Any,
    counts_ref: Any,
    out_ref: Any,
    written: Int32[Array, ""],
    visible: Int32[Array, ""],
    hidden: Int32[Array, ""] | None = None,
    *,
    k: int,
) -> None:
    """Write the list of one query, [1, k].

    Args:
      keys_ref: ordered scores, [R, 128]; `NOTHING` for entries that are not seen.
      peaks_ref: the few largest keys of each of at least k disjoint sets that make up all keys.
      chosen_ref: scratch for marks, bfloat16 [R, 128].
      counts_ref: scratch for the number of marks per row, float32 [128, 128].
      out_ref: the list.
      written: rows of keys that were written, a multiple of 8.
      visible: entries below this are seen,
      hidden: but not those below this; None: 0.
      k: entries to choose.
    """
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, k), 1)

    number = visible if hidden is None else visible - hidden

    @pl.when(number <= k)
    def _all() -> None:
        entry = slot if hidden is None else slot + hidden
        out_ref[...] = jnp.where(slot < number, entry, -1)

    @pl.when(number > k)
    def _best() -> None:
        rows = jax.lax.div(visible + LANES - 1, LANES)
        blank(keys_ref, written)
        key, last = cut(keys_ref, peaks_ref, rows, k)
        mark(keys_ref, chosen_ref, counts_ref, rows, key, last)
        slots = pl.cdiv(k, LANES) * LANES
        out_ref[...] = listed(chosen_ref, counts_ref, rows, slots)[:, :k]


def blank(keys_ref: Any, start: Int32[Array, ""]) -> None:
    """Fill rows from `start`, a multiple of 8, to the end of the loops' last step with NOTHING."""
    step = min(_STEP, keys_ref.shape[0])
    end = jax.lax.div(start + step - 1, step) * step

    def body(index: Any, carry: Any) -> Any:
        at = pl.multiple_of(start + index * 8, 8)
        keys_ref[pl.ds(at, 8), :] = jnp.full((8, LANES), NOTHING, jnp.int32)
        return carry

    jax.lax.fori_loop(0, jax.lax.div(end - start, 8), body, 0)


def _count(keys_ref: Any, rows: Int32[Array, ""], hits: Hits) -> Int32[Array, ""]:
    """Number of hits among the keys of the first `rows` rows."""
    step = min(_STEP, keys_ref.shape[0])
    # Several sums at a time, because each addition waits for the one before.
    wide = 32 if step % 32 == 0 else 8

    def body(index: Any, count_W: Any) -> Any:
        start = pl.multiple_of(index * step, step)
        hit = hits(keys_ref[pl.ds(start, step), :], start)
        ones = jnp.where(hit, 1, 0).reshape(step // wide, wide, LANES)
        return count_W + jnp.sum(ones, axis=0)

    steps = jax.lax.div(rows + step - 1, step)
    return jnp.sum(jax.lax.fori_loop(0, steps, body, jnp.zeros((wide, LANES), jnp.int32)))


def _largest_with(
    count_from: Callable[[Int32[Array, ""]], Int32[Array, ""]],
    low: Int32[Array, ""],
    high: Int32[Array, ""],
    count: Int32[Array, ""],
    k: int,
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """The largest key in [low, high] that at least k keys reach, and how many reach it.

    `count` keys, at least k, reach `low`. The search ends once exactly k do.
    """

    def going(state: Any) -> Any:
        low, high, count = state
        return (low < high) & (count != k)

    def halve(state: Any) -> Any:
        low, high, count = state
        # The mean, rounded up, without overflow.
        middle = (low | high) - ((low ^ high) >> 1)
        reached = count_from(middle)
        up = reached >= k
        return (
            jnp.where(up, middle, low),
            jnp.where(up, high, middle - 1),
            jnp.where(up, reached, count),
        )

    low, _, count = jax.lax.while_loop(going, halve, (low, high, count))
    return low, count


def cut(
    keys_ref: Any, peaks_ref: Any, rows: Int32[Array, ""], k: int
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """The k-th largest key of more than k, and the last index at which an equal key is chosen.

    The k-th largest peak is a lower bound, and usually the key itself: then a single pass over all
    keys is enough.
    """
    peaks = peaks_ref[...]
    most = jnp.max(peaks)
    among_peaks = lambda key: jnp.sum(jnp.where(peaks >= key, 1, 0))
    from_key = lambda key: _count(keys_ref, rows, lambda keys, _: keys >= key)
    low, _ = _largest_with(among_peaks, jnp.min(peaks), most, jnp.int32(peaks.size), k)
    count = from_key(low)

    def search() -> tuple[Any, Any]:
        high = jnp.where(from_key(low + 1) >= k, most, low)
        key, count_from_key = _largest_with(from_key, low, high, count, k)
        last = jax.lax.cond(
            count_from_key == k,
            lambda: jnp.int32(_MANY),
            lambda: _last_equal(keys_ref, rows, key, k),
        )
        return key, last

    return jax.lax.cond(count == k, lambda: (low, jnp.int32(_MANY)), search)


def _last_equal(
    keys_ref: Any, rows: Int32[Array, ""], key: Int32[Array, ""], k: int
) -> Int32[Array, ""]:
    """The smallest index up to which there are enough keys equal to the k-th largest."""
    missing = k - _count(keys_ref, rows, lambda keys, _: keys > key)

    def halve(state: Any) -> Any:
        low, high = state
        middle = (low + high) >> 1
        equal = lambda keys, start: (keys == key) & (index_of(keys.shape[0], start) <= middle)
        enough = _count(keys_ref, rows, equal) >= missing
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = jnp.int32(0), rows * LANES - 1
    return jax.lax.while_loop(lambda state: state[0] < state[1], halve, bounds)[1]


def index_of(rows: int, start: Int32[Array, ""]) -> Int32[Array, "rows 128"]:
    """Indices of the entries of `rows` rows, from row `start` on."""
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
    return (start + row) * LANES + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)


def _bits(x: Bool[Array, "*dims"]) -> Any:
    """Booleans as 0 and 1 in bfloat16, exact in every product here."""
    return jnp.where(x, 1.0, 0.0).astype(jnp.bfloat16)


def mark(
    keys_ref: Any,
    chosen_ref: Any,
    counts_ref: Any,
    rows: Int32[Array, ""],
    key: Int32[Array, ""],
    last: Int32[Array, ""],
) -> None:
    """Write which keys are chosen, 0 or 1 [R, 128], and how many per row, [G, 128]."""
    step = min(_STEP, keys_ref.shape[0])
    per_group = min(LANES, step)
    counts_ref[...] = jnp.zeros_like(counts_ref)

    def body(index: Any, carry: Any) -> Any:
        start = pl.multiple_of(index * step, step)
        keys = keys_ref[pl.ds(start, step), :]
        equal = (keys == key) & (index_of(step, start) <= last)
        chosen = _bits((keys > key) | equal)
        chosen_ref[pl.ds(start, step), :] = chosen
        counts = contract(jnp.ones((8, LANES), jnp.bfloat16), chosen, 1, 1)
        for group in range(step // per_group):
            at = pl.ds(index * (step // per_group) + group, 1)
            of_group = counts[:1, group * per_group : (group + 1) * per_group]
            counts_ref[at, pl.ds(0, per_group)] = of_group
        return carry

    jax.lax.fori_loop(0, jax.lax.div(rows + step - 1, step), body, 0)


def listed(
    chosen_ref: Any, counts_ref: Any, rows: Int32[Array, ""], slots: int
) -> Int32[Array, "1 P"]:
    """Indices of the chosen entries, ascending; slots after the last are meaningless."""
    group_P1, within_P1, rank_P1, row_1P = _rows_of_slots(counts_ref, slots)
    step = min(_STEP, chosen_ref.shape[0])
    per_group = min(LANES, step)
    iota_PL = jax.lax.broadcasted_iota(jnp.int32, (slots, per_group), 1).astype(jnp.float32)
    within_PL = _bits(iota_PL == within_P1)

    def fetch(index: Any, marks_PL: Any) -> Any:
        for part in range(step // per_group):
            group = index * (step // per_group) + part
            start = pl.multiple_of(group * per_group, per_group)
            rows_PL = contract(within_PL, chosen_ref[pl.ds(start, per_group), :], 1, 0)
            marks_PL = jnp.where(group_P1 == group.astype(jnp.float32), rows_PL, marks_PL)
        return marks_PL

    steps = jax.lax.div(rows + step - 1, step)
    marks_PL = jax.lax.fori_loop(0, steps, fetch, jnp.zeros((slots, LANES), jnp.float32))
    upto_PL = contract(marks_PL.astype(jnp.bfloat16), _upper(), 1, 0)
    lane_1P = contract(jnp.ones((8, LANES), jnp.bfloat16), _bits(upto_PL <= rank_P1), 1, 1)[:1]
    return (row_1P * LANES + lane_1P).astype(jnp.int32)


def _upper() -> Any:
    """Upper triangle of ones: products with it are running sums along lanes."""
    iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis)
    return _bits(iota(0) <= iota(1))


def _rows_of_slots(
    counts_ref: Any, slots: int
) -> tuple[Float32[Array, "P 1"], Float32[Array, "P 1"], Float32[Array, "P 1"], Any]:
    """Each slot's group, row in the group and rank in the row; and its row along lanes, [1, P]."""
    exact = jax.lax.Precision.HIGHEST
    ones = jnp.ones((8, LANES), jnp.bfloat16)
    counts_GL = counts_ref[...].astype(jnp.bfloat16)
    total_8G = contract(ones, counts_GL, 1, 1)
    upto_8G = contract(total_8G, _upper().astype(jnp.float32), 1, 0, exact)
    upto_1G, before_1G = upto_8G[:1], (upto_8G - total_8G)[:1]
    slot_PG = jax.lax.broadcasted_iota(jnp.int32, (slots, LANES), 0).astype(jnp.float32)
    passed_PG = upto_1G <= slot_PG
    here_PG = (before_1G <= slot_PG) & (slot_PG < upto_1G)
    start_P1 = jnp.sum(jnp.where(here_PG, before_1G, 0.0), axis=1, keepdims=True)
    group_P1 = jnp.sum(jnp.where(passed_PG, 1.0, 0.0), axis=1, keepdims=True)
    group_1P = contract(ones, _bits(passed_PG), 1, 1)[:1]
    # Running counts of a group's rows, as two digits that bfloat16 holds exactly.
    upto_GL = contract(counts_GL, _upper(), 1, 0)
    high_GL = jnp.floor(upto_GL * (1 / 256))
    digit = lambda x_GL: contract(_bits(here_PG), x_GL.astype(jnp.bfloat16), 1, 0)
    upto_PL = digit(high_GL) * 256 + digit(upto_GL - high_GL * 256)
    place_P1 = slot_PG[:, :1] - start_P1
    passed_PL = upto_PL <= place_P1
    before_P1 = jnp.max(jnp.where(passed_PL, upto_PL, 0.0), axis=1, keepdims=True)
    within_P1 = jnp.sum(jnp.where(passed_PL, 1.0, 0.0), axis=1, keepdims=True)
    within_1P = contract(ones, _bits(passed_PL), 1, 1)[:1]
    return group_P1, within_P1, place_P1 - before_P1, group_1P * LANES + within_1P
