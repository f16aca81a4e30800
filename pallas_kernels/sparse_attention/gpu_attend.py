"""Attention of one query's heads, 64 at a time, to a part of its list.

Of a block's three warpgroups, one gathers chunks of rows and two attend to them, each for half of
the value channels. Both compute all weights: they are then where the products need them, and no
maximum has to be exchanged.

Axis letters: as in the package; Z parts of a list, X rows of a list, C rows per chunk, h = 64
heads per block, V channels per product.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.mosaic_gpu import PARAMS, along, product, store
from pallas_kernels.sparse_attention import gpu_gather
from pallas_kernels.sparse_attention.gpu_gather import CHUNK, TILED, load
from pallas_kernels.sparse_attention.rows import Fp8Rows

HEADS = 64
_GATHERER = 2  # the warpgroup
# Registers per thread that gathers, and per thread that attends. Three warpgroups start with 168
# each; if the new numbers added up to more, they would wait for registers forever.
_GATHERING, _ATTENDING = 56, 224
_STAGES = 2
_LOG2E = math.log2(math.e)
_TILE = plgpu.Layout.WGMMA
_BY_HEAD, _BY_ROW = _TILE.reduce(1), _TILE.reduce(0)


def attend(
    q_BTHK: Float[Array, "B T H K"],
    window_BRK: Float[Array, "B R K"],
    pool_LBSK: Float[Array, "L _ S K"] | Fp8Rows,
    layer: Int[Array, ""],
    rows_BTX: Int32[Array, "B T X"],
    sink_H: Float32[Array, " H"],
    *,
    near: int,
    parts: int,
    scale: float,
) -> tuple[Float[Array, "B T Z H K"], Float32[Array, "B T Z H"]]:
    """Weighted means of the listed rows, and the logs of the sums of weights.

    The first `near` numbers of each list, whole chunks, are rows of the window, the others entries
    of the pool; -1 for none. All parts of a list have the same number of chunks. The sink counts as
    a key of the first part.

    Returns:
      Means, in the dtype of q if there is one part, otherwise in float32; and logs.
    """
    B, T, H, K = q_BTHK.shape
    chunks = rows_BTX.shape[2] // parts // CHUNK
    rows_BTZNC = rows_BTX.reshape(B, T, parts, chunks, CHUNK)
    narrow = isinstance(pool_LBSK, Fp8Rows)
    pool = pool_LBSK.data if narrow else pool_LBSK
    window_units, pool_units = gpu_gather.in_units(window_BRK), gpu_gather.in_units(pool)
    call = _Call(
        queries=T,
        channels=K,
        chunks=chunks,
        near=near,
        window=window_BRK.shape[1],
        entries=pool.shape[2],
        batch=pool.shape[1],
        narrow=narrow,
        scale=scale,
    )
    out_type = (
        jax.ShapeDtypeStruct((B, T, parts, H, K), q_BTHK.dtype if parts == 1 else jnp.float32),
        jax.ShapeDtypeStruct((B, T, parts, H), jnp.float32),
    )
    return plgpu.kernel(
        call.run,
        out_type=out_type,
        # A query's blocks of heads are adjacent, because they read the same rows. Only the last
        # grid dim may exceed 65535.
        grid=(parts, B * T * (H // HEADS)),
        grid_names=("part", "query_heads"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=call.scratch(),
        compiler_params=PARAMS,
        kernel_name="sparse_attention",
    )(q_BTHK, window_units, pool_units, layer.astype(jnp.int32)[None], rows_BTZNC, sink_H)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """Sizes of one call.

    Attributes:
      queries, channels: T, K.
      chunks: chunks of a part's list.
      near: rows of the window per list.
      window, entries: R, S.
      batch: rows of the pool; 1 if all rows of the batch share it.
      narrow: whether entries are `Fp8Rows`.
      scale: scale of the logits.
    """

    queries: int
    channels: int
    chunks: int
    near: int
    window: int
    entries: int
    batch: int
    narrow: bool
    scale: float

    @property
    def slots(self) -> int:
        """Buffers for chunks of keys: two, unless staging buffers of both kinds leave no room."""
        return 1 if self.narrow else 2

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers; each of the two attending warpgroups has its own weights."""
        matrix = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=TILED)
        return {
            "q_hK": matrix((HEADS, self.channels)),
            "sink_h": plgpu.SMEM((HEADS,), jnp.float32),
            "row_NC": plgpu.SMEM((self.chunks, CHUNK), jnp.int32),
            **gpu_gather.stages(self.channels, narrow=self.narrow, slots=_STAGES),
            "keys": matrix((self.slots, CHUNK, self.channels)),
            "weights": matrix((2, HEADS, CHUNK)),
            "q_here": plgpu.Barrier(num_arrivals=3),
            "staged": plgpu.Barrier(num_arrivals=CHUNK, num_barriers=_STAGES),
            "ready": plgpu.Barrier(num_barriers=self.slots),
            "free": plgpu.Barrier(num_arrivals=2, num_barriers=self.slots),
        }

    def run(
        self,
        q_ref: Any,
        window_ref: Any,
        pool_ref: Any,
        layer_ref: Any,
        rows_ref: Any,
        sink_ref: Any,
        value_ref: Any,
        lse_ref: Any,
        **smem: Any,
    ) -> None:
        """The kernel's body: the work of a block's three warpgroups."""
        warpgroup, part = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("part")
        block, of_query = jax.lax.axis_index("query_heads"), q_ref.shape[2] // HEADS
        query = jax.lax.div(block, of_query)
        heads = pl.ds(jax.lax.rem(block, of_query) * HEADS, HEADS)
        b, t = jax.lax.div(query, self.queries), jax.lax.rem(query, self.queries)

        @pl.when(warpgroup == _GATHERER)
        def _() -> None:
            plgpu.set_max_registers(_GATHERING, action="decrease")
            plgpu.copy_gmem_to_smem(rows_ref.at[b, t, part], smem["row_NC"], smem["q_here"])
            plgpu.copy_gmem_to_smem(q_ref.at[b, t, heads], smem["q_hK"], smem["q_here"])
            plgpu.copy_gmem_to_smem(sink_ref.at[heads], smem["sink_h"], smem["q_here"])
            plgpu.barrier_wait(smem["q_here"])
            near = gpu_gather.Source(window_ref, b * self.window, narrow=False)
            row = b if self.batch > 1 else 0
            first = (layer_ref[0] * self.batch + row) * self.entries
            far = gpu_gather.Source(pool_ref, first, narrow=self.narrow)
            near_chunks = self.near // CHUNK - part * self.chunks
            self._gather(near, far, near_chunks, smem)

        @pl.when(warpgroup != _GATHERER)
        def _() -> None:
            plgpu.set_max_registers(_ATTENDING, action="increase")
            plgpu.barrier_wait(smem["q_here"])
            largest_h, total_h, values = self._attend(warpgroup, part == 0, smem)
            inverse_h = 1.0 / jnp.where(total_h == 0, 1.0, total_h)
            for i, value_hV in enumerate(values):
                value_hV = value_hV * along(inverse_h, value_hV.shape, 0)
                columns = self._columns(warpgroup, i)
                to_hV = value_ref.at[b, t, part, heads, columns]
                store(to_hV, value_hV.astype(value_ref.dtype))

            @pl.when(warpgroup == 0)
            def _() -> None:
                store(lse_ref.at[b, t, part, heads], largest_h / _LOG2E + jnp.log(total_h))

    def _gather(self, near: Any, far: Any, near_chunks: Any, smem: Any) -> None:
        """Gather chunk by chunk; the next is copied while one is laid out."""

        def fetch(chunk: Any) -> None:
            stage = jax.lax.rem(chunk, _STAGES)
            for source, is_source in ((near, chunk < near_chunks), (far, chunk >= near_chunks)):
                start = functools.partial(gpu_gather.fetch, source, stage, chunk, smem)
                pl.when(is_source)(start)

        fetch(jnp.int32(0))

        @pl.loop(0, self.chunks)
        def _(chunk: Array) -> None:
            stage, slot = jax.lax.rem(chunk, _STAGES), jax.lax.rem(chunk, self.slots)
            pl.when(chunk + 1 < self.chunks)(lambda: fetch(chunk + 1))
            plgpu.barrier_wait(smem["staged"].at[stage])
            pl.when(chunk >= self.slots)(lambda: plgpu.barrier_wait(smem["free"].at[slot]))
            for source, is_source in ((near, chunk < near_chunks), (far, chunk >= near_chunks)):
                keys = smem["keys"].at[slot]
                move = functools.partial(gpu_gather.lay_out, source, stage, chunk, keys, smem)
                pl.when(is_source)(move)
            # Also keeps the next copies out of a staging buffer that is still being read.
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["ready"].at[slot])

    def _attend(self, warpgroup: Array, with_sink: Any, smem: Any) -> Any:
        """Running maximum (times log2 e), sum of weights, and values of half of the channels."""
        sink_h = load(smem["sink_h"], _BY_HEAD) * _LOG2E
        constant = lambda x: plgpu.layout_cast(jnp.full((HEADS,), x, jnp.float32), _BY_HEAD)
        largest_h = jnp.where(with_sink, sink_h, constant(-jnp.inf))
        total_h = jnp.where(with_sink, constant(1.0), constant(0.0))
        zero_hV = plgpu.layout_cast(jnp.zeros((HEADS, self._width), jnp.float32), _TILE)
        values = (zero_hV,) * (self.channels // 2 // self._width)

        def step(chunk: Array, state: Any) -> Any:
            slot = jax.lax.rem(chunk, self.slots)
            plgpu.barrier_wait(smem["ready"].at[slot])
            largest_h, total_h, values = state
            keys_CK = smem["keys"].at[slot]
            logits_hC = product(smem["q_hK"], keys_CK.transpose((1, 0)))
            exists_C = load(smem["row_NC"].at[chunk], _BY_ROW) >= 0
            seen_hC = along(exists_C, logits_hC.shape, 1)
            logits_hC = jnp.where(seen_hC, logits_hC * (self.scale * _LOG2E), -jnp.inf)
            new_h = jnp.maximum(largest_h, jnp.max(logits_hC, axis=1))
            base_h = jnp.where(new_h == -jnp.inf, 0.0, new_h)
            shrink_h = jnp.exp2(largest_h - base_h)
            weight_hC = jnp.exp2(logits_hC - along(base_h, logits_hC.shape, 0))
            total_h = total_h * shrink_h + jnp.sum(weight_hC, axis=1)
            smem["weights"][warpgroup] = weight_hC.astype(jnp.bfloat16)
            plgpu.commit_smem()
            shrink_hV = along(shrink_h, zero_hV.shape, 0)
            weights = smem["weights"].at[warpgroup]
            columns = functools.partial(self._columns, warpgroup)
            values = tuple(
                value_hV * shrink_hV + product(weights, keys_CK.at[:, columns(i)])
                for i, value_hV in enumerate(values)
            )
            pl.when(chunk + self.slots < self.chunks)(
                lambda: plgpu.barrier_arrive(smem["free"].at[slot])
            )
            return new_h, total_h, values

        return jax.lax.fori_loop(0, self.chunks, step, (largest_h, total_h, values))

    @property
    def _width(self) -> int:
        """Channels per product, whose sums take 32 registers before they are added up."""
        return math.gcd(self.channels // 2, 64)

    def _columns(self, warpgroup: Array, i: int) -> Any:
        """Channels of a warpgroup's i-th product."""
        return pl.ds(warpgroup * (self.channels // 2) + i * self._width, self._width)
