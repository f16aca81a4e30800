"""How a door answers a wish for an implementation."""

from collections.abc import Collection


def require(op: str, impl: str, known: Collection[str]) -> None:
    """Refuse what there is not, never silently.

    Raises:
      NotImplementedError: naming what there is.
    """
    if impl not in known:
        raise NotImplementedError(f"{op} has no '{impl}' form; pass one of {sorted(known)}.")
