"""The arrays of each operation, as one record; the package documents them.

Axis letters: as in the package.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sparse_attention.rows import Pool


class DecodeInputs(NamedTuple):
    """Arrays of `decode`."""

    q_BTHK: Float[Array, "B T H K"]
    window_BRK: Float[Array, "B R K"]
    window_mask_BTR: Bool[Array, "B T R"]
    pool_LBSK: Pool
    layer: Int[Array, ""]
    indices_BTk: Int[Array, "B T k"]
    sink_H: Float[Array, " H"]


class PrefillInputs(NamedTuple):
    """Arrays of `prefill`."""

    q_BTHK: Float[Array, "B T H K"]
    window_BXK: Float[Array, "B X K"]
    start_B: Int[Array, " B"]
    pool_LBSK: Pool
    layer: Int[Array, ""]
    indices_BTk: Int[Array, "B T k"]
    sink_H: Float[Array, " H"]
    first_BT: Int[Array, "B T"] | None = None
