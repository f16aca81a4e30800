"""The arrays of each operation, as one record; the package documents them.

Axis letters: as in the package.
"""

from typing import NamedTuple, TypeAlias

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.paged import Paged

Pool: TypeAlias = Float[Array, "L B S K"] | Paged | None


class DecodeInputs(NamedTuple):
    """Arrays of `decode`."""

    q_BTHK: Float[Array, "B T H K"]
    window_BRK: Float[Array, "B R K"]
    window_mask_BTR: Bool[Array, "B T R"]
    pool_LBSK: Pool
    layer: Int[Array, ""]
    visible_BT: Int[Array, "B T"]
    sink_H: Float[Array, " H"]


class PrefillInputs(NamedTuple):
    """Arrays of `prefill`."""

    q_BTHK: Float[Array, "B T H K"]
    window_BXK: Float[Array, "B X K"]
    start_B: Int[Array, " B"]
    pool_LBSK: Pool
    layer: Int[Array, ""]
    visible_BT: Int[Array, "B T"]
    sink_H: Float[Array, " H"]
    first_BT: Int[Array, "B T"] | None = None
    hidden_BT: Int[Array, "B T"] | None = None
