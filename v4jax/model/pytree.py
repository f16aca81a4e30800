"""Frozen dataclasses as JAX pytrees."""

import dataclasses
from typing import Any, TypeVar

import jax
from jax.tree_util import GetAttrKey

_T = TypeVar("_T")


def pytree(cls: type[_T]) -> type[_T]:
    """Register a dataclass as a pytree whose children are its fields.

    JAX rebuilds pytrees with leaves that are not arrays: shardings, booleans, placeholders. So,
    unlike with `jax.tree_util.register_dataclass`, they are rebuilt without `__init__`, where tests
    check the annotated shapes and dtypes of the fields.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]

    def flatten(tree: _T) -> tuple[list[Any], None]:
        return [getattr(tree, name) for name in names], None

    def flatten_with_keys(tree: _T) -> tuple[list[tuple[Any, Any]], None]:
        return [(GetAttrKey(name), getattr(tree, name)) for name in names], None

    def unflatten(_: None, children: Any) -> _T:
        tree = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(tree, name, child)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
