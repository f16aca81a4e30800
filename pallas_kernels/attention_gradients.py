"""Gradients of the two attention operations, and their packing as cotangents."""

from typing import Any, NamedTuple


class Gradients(NamedTuple):
    """Gradients of queries, window, pool and sink; `pool` is None without a pool or for Fp8Rows."""

    q: Any
    window: Any
    pool: Any
    sink: Any


def cotangents(inputs: Any, gradients: Gradients) -> Any:
    """A record like `inputs` with gradients in place of arrays, None where there is none."""
    window = "window_BRK" if "window_BRK" in inputs._fields else "window_BXK"
    by_name = {"q_BTHK": gradients.q, "pool_LBSK": gradients.pool, "sink_H": gradients.sink}
    by_name[window] = gradients.window
    return type(inputs)(**{name: by_name.get(name) for name in inputs._fields})
