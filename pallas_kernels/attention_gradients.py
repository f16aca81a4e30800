"""What the two attention operations' gradients are, and how their doors hand them on."""

from typing import Any, NamedTuple


class Gradients(NamedTuple):
    """Of queries, window, pool and sink; None where there is no pool, or one of bytes."""

    q: Any
    window: Any
    pool: Any
    sink: Any


def cotangents(inputs: Any, gradients: Gradients) -> Any:
    """The record of an operation's inputs with gradients in their places; None: there is none."""
    window = "window_BRK" if "window_BRK" in inputs._fields else "window_BXK"
    of = {"q_BTHK": gradients.q, "pool_LBSK": gradients.pool, "sink_H": gradients.sink}
    of[window] = gradients.window
    return type(inputs)(**{name: of.get(name) for name in inputs._fields})
