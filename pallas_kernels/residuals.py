"""What a backward pass saves of its forward pass.

Results that cost more to compute than to read back (products, attention) are named; under the
policy `SAVE_NAMED` of `jax.checkpoint` everything else (norms, rotations, gates, masks) is
recomputed, which takes less time than its memory would.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_NAME = "saveable"
SAVE_NAMED = jax.checkpoint_policies.save_only_these_names(_NAME)


def saveable(values: Any) -> Any:
    """The same values, saved for the backward pass under `SAVE_NAMED`."""
    return jax.tree.map(lambda x: checkpoint_name(x, _NAME), values)
