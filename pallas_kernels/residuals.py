"""What a gradient keeps of its forward pass.

Products, attention and whatever else computes more than it reads are named; under the policy `KEEP`
of `jax.checkpoint` the rest - norms, rotations, gates, masks - is computed anew, which takes less
time than memory takes to keep it.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"
KEEP = jax.checkpoint_policies.save_only_these_names(_KEPT)


def kept(values: Any) -> Any:
    """The same values, which a backward pass under `KEEP` finds instead of computing."""
    return jax.tree.map(lambda x: checkpoint_name(x, _KEPT), values)
