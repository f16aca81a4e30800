"""What the forward pass saves for the backward pass.

Results that cost more to compute than to read back (products, attention) are named. What is not
saved is recomputed: norms, rotations, gates and masks cost less than reading them back would.
"""

from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["full", "experts", "light"]
_NAME, _EXPERTS = "saveable", "experts"
_saved = jax.checkpoint_policies.save_only_these_names
# Policies of `jax.checkpoint`: recompute everything; everything but the experts' outputs, for which
# tokens would have to travel again; only what is not named.
POLICIES: dict[Remat, Any] = {
    "full": None,
    "experts": _saved(_EXPERTS),
    "light": _saved(_NAME, _EXPERTS),
}


def saveable(values: Any, *, experts: bool = False) -> Any:
    """The same values, named; `experts`: they are the routed experts' outputs."""
    return jax.tree.map(lambda x: checkpoint_name(x, _EXPERTS if experts else _NAME), values)
