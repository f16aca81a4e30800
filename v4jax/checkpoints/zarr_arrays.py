"""The arrays of a native checkpoint: an Orbax checkpoint that is written slice by slice.

Orbax writes entire arrays, and a stack of experts exceeds many machines' memory. So arrays are
written here, matrix by matrix, with TensorStore, which Orbax builds on: a folder per array, a file
per chunk (zarr 2, uncompressed), and Orbax's two metadata files.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from v4jax.checkpoints.disk import CheckpointError, write_json
from v4jax.checkpoints.zarr_files import DAMAGED

# Approximate chunk size: a host that needs part of a matrix reads little more than that part.
_CHUNK_BYTES = 32 * 2**20


@contextlib.contextmanager
def explained(what: Path, remedy: str) -> Iterator[None]:
    """Turn TensorStore's errors into a CheckpointError."""
    try:
        yield
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{what}: {reason:.200} {remedy}") from error


def chunk_shape(shape: tuple[int, ...], stack_dims: int, itemsize: int) -> tuple[int, ...]:
    """The chunk shape: a tensor of the stack, cut along its first dim to limit the size."""
    rows, *rest = shape[stack_dims:]
    cuts = math.ceil(rows * math.prod(rest) * itemsize / _CHUNK_BYTES)
    return (*(1 for _ in range(stack_dims)), math.ceil(rows / max(cuts, 1)), *rest)


class Arrays:
    """The arrays in a folder, by name."""

    def __init__(
        self, folder: Path, *, database: bool = False, zarr3: bool = False, remedy: str = DAMAGED
    ) -> None:
        """Open a folder.

        Args:
          folder: folder to read or write in.
          database: whether all arrays are in one OCDBT database, as Orbax itself writes them.
          zarr3: whether they use zarr 3 instead of zarr 2.
          remedy: what to do if an array cannot be read, to end the error message.
        """
        self._folder, self._database, self._remedy = folder, database, remedy
        self._driver = "zarr3" if zarr3 else "zarr"
        # No cache: every chunk is read or written once.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """An array opened for reading; see `read`."""
        if name not in self._open:
            spec = {**self._spec(name), "fill_missing_data_reads": False}
            with explained(self._folder / name, self._remedy):
                self._open[name] = ts.open(spec, read=True, context=self._context).result()
        return self._open[name]

    def read(self, name: str, index: tuple[Any, ...]) -> np.ndarray:
        """Read a slice of an array."""
        store = self[name]
        with explained(self._folder / name, self._remedy):
            return store[index].read().result()

    def create(self, name: str, shape: tuple[int, ...], dtype: Any, stack_dims: int) -> Any:
        """Create an array in chunks of `chunk_shape`, or open it as it is if it exists."""
        dtype = np.dtype(dtype)
        metadata = {
            "shape": shape,
            "chunks": chunk_shape(shape, stack_dims, dtype.itemsize),
            # zarr has no names for small floats; these are TensorStore's.
            "dtype": ts.dtype(dtype).name if dtype.kind == "V" else dtype.str,
            "compressor": None,
            "fill_value": None,
        }
        spec = {**self._spec(name), "metadata": metadata, "store_data_equal_to_fill_value": True}
        with explained(self._folder / name, "Remove what is there."):
            return ts.open(spec, open=True, create=True, context=self._context).result()

    def _spec(self, name: str) -> dict[str, Any]:
        store = {"driver": "file", "path": f"{self._folder / name}/"}
        if self._database:
            base = {"driver": "file", "path": f"{self._folder}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        return {"driver": self._driver, "kvstore": store}

    def write_metadata(self, names: Sequence[str]) -> None:
        """Write Orbax's metadata files, with which it restores the arrays as NumPy arrays."""
        tree = {
            str((name,)): {
                "key_metadata": [{"key": name, "key_type": 2}],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for name in names
        }
        write_json(
            self._folder / "_METADATA",
            {
                "tree_metadata": tree,
                "use_ocdbt": False,
                "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            },
        )
        # Orbax takes a second to import, and only writers need it.
        from orbax.checkpoint.handlers import PyTreeCheckpointHandler

        handler = {"item_handlers": PyTreeCheckpointHandler.typestr()}
        write_json(self._folder / "_CHECKPOINT_METADATA", handler)
