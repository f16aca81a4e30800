"""What the forward pass saves for the backward pass.

Results that cost more to compute than to read back (products, attention) are named; under the
policy `SAVE_NAMED` of `jax.checkpoint` everything else (norms, rotations, gates, masks) is
recomputed, which costs less time than reading it back would.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_NAME = "saveable"
SAVE_NAMED = jax.checkpoint_policies.save_only_these_names(_NAME)


def saveable(values: Any) -> Any:
    """The same values, saved for the backward pass under `SAVE_NAMED`."""
    return jax.tree.map(lambda x: checkpoint_name(x, _NAME), values)
