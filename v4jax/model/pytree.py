"""Frozen dataclasses as JAX's trees."""

import dataclasses
from typing import Any, TypeVar

import jax
from jax.tree_util import GetAttrKey

_T = TypeVar("_T")


def pytree(cls: type[_T]) -> type[_T]:
    """Decorates a dataclass whose fields are children of a tree.

    JAX rebuilds trees with leaves that are no arrays: shardings, booleans, placeholders. So, unlike
    `jax.tree_util.register_dataclass`, a tree is rebuilt without `__init__`, where tests check the
    annotated shapes and dtypes of the fields.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]

    def flatten(tree: _T) -> tuple[list[Any], None]:
        return [getattr(tree, name) for name in names], None

    def flatten_with_keys(tree: _T) -> tuple[list[tuple[GetAttrKey, Any]], None]:
        return [(GetAttrKey(name), getattr(tree, name)) for name in names], None

    def unflatten(_: None, children: Any) -> _T:
        tree = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(tree, name, child)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
