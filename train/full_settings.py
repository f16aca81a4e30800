"""Settings of full training; imports no JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Full:
    """Full training of all weights but tables of expert ids and routers' biases.

    Attributes:
      mtp: train the MTP blocks too, in a recipe where `losses.mtp` gives them a gradient.
      indexers: train sparse attention's indexers too. Only `losses.indexer` gives them a gradient;
        without it, weight decay alone would move them.
      dtype: dtype of trained weights in computation; a recipe sets it with `model.dtype`.
      fp4_experts: compute with the routed experts rounded to FP4; gradients pass straight through
        the rounding.
    """

    mtp: bool = True
    indexers: bool = False
    dtype: str | None = None
    fp4_experts: bool = False
