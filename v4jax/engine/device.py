"""The engine's arrays and the programs that run on them.

Axis letters: as in `v4jax.engine.programs`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Int16

from v4jax.decoding.sampling import SamplingParams
from v4jax.engine import inputs, programs
from v4jax.engine.arrays import (
    AnyArray,
    Counts,
    Drafting,
    Rows,
    Sampled,
    Scores,
    Static,
)
from v4jax.engine.inputs import Masks, Shape
from v4jax.engine.request import Request
from v4jax.engine.scheduler import Chunk
from v4jax.engine.sequence import Sequence
from v4jax.model import cache as caches
from v4jax.model import grouped_rows, paging, sharding
from v4jax.model.cache import BLOCK, Cache
from v4jax.model.sharding import ROWS
from v4jax.model.transformer import Model


def empty(shape: Shape, static: Static, dtype: Any) -> tuple[Cache, Counts]:
    """A cache without tokens, and the counts of none."""
    cfg = static.cfg
    sizes = {"rows": shape.rows, "pages": shape.pages, "page": shape.page}
    counts = Counts(
        in_prompt_BV=jnp.zeros((shape.rows, cfg.vocab_size), bool),
        count_BV=jnp.zeros((shape.rows, cfg.vocab_size), jnp.int32),
    )
    how = {"dtype": dtype, "entries": shape.entries, "numerics": static.numerics}
    return paging.make(cfg, **sizes, **how, mtp=static.drafts > 0), counts


class Device:
    """Cache and counts of an engine; the methods of `memory.Device`, and the two programs."""

    def __init__(self, models: dict[str | None, Model], shape: Shape, static: Static, dtype: Any):
        """Allocate an empty cache.

        Args:
          models: the base model, under None, and adapted ones by name.
          shape: sizes.
          static: what the programs are compiled for.
          dtype: dtype of the cache.
        """
        self.shape, self.static = shape, static
        self._models, self._cfg = models, static.cfg
        # Where the weights are: programs would be compiled again once their outputs are there.
        self._mesh = sharding.mesh_of(models[None])
        self._place = jax.devices()[0] if self._mesh is None else NamedSharding(self._mesh, P())
        make = functools.partial(empty, shape, static, dtype)
        if (mesh := self._mesh) is None:
            self._cache, self._counts = jax.device_put(make(), self._place)
        else:
            cache, counts = jax.eval_shape(make)
            where = (
                jax.tree.map(lambda x: caches.place(x.shape, mesh), cache),
                jax.tree.map(lambda x: sharding.place(ROWS, x.shape, mesh), counts),
            )
            self._cache, self._counts = jax.jit(make, out_shardings=where)()
        self._empty_rows: dict[int, tuple[Rows, Any]] = {}
        for count in (shape.rows, shape.groups):
            rows = inputs.empty_rows(count, shape, static)
            self._empty_rows[count] = rows, jax.device_put(self._by_row(rows.allowed_BW))

    @functools.cached_property
    def _block(self) -> "_Layout":
        with sharding.on(self._mesh):
            page = jax.eval_shape(paging.read_page, self._cache, jnp.int32(0))
        return _Layout(jax.eval_shape(lambda page: self._part(page, 0), page))

    @functools.cached_property
    def _snapshot(self) -> "_Layout":
        take, zero = functools.partial(paging.snapshot, cfg=self._cfg), jnp.int32(0)
        with sharding.on(self._mesh):
            return _Layout(jax.eval_shape(take, self._cache, zero, zero))

    @property
    def width(self) -> int:
        """Tokens that a step runs for a row: the newest and its drafts."""
        return 1 + self.static.drafts

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(array.nbytes for array in jax.tree.leaves(self._cache))

    def programs(self) -> list[tuple[str, Callable[[], Any]]]:
        """What compiles each program: a call that changes nothing but scratch."""
        programs: list[tuple[str, Callable[[], Any]]] = []
        for adapter in self._models:
            idle, of = _idle(adapter), f" of adapter {adapter}" if adapter else ""
            chunks = [Chunk(idle, 0, 1, narrow) for narrow in (True, False)]
            for width, chunk in zip(self.shape.widths, chunks, strict=True):
                read = functools.partial(self.read_chunks, [chunk], {})
                programs.append((f"chunks of {width} tokens{of}", read))
            programs.append((f"steps{of}", functools.partial(self.advance, [idle], {}, 1)))
        return [*programs, ("copies of pages and rows", self._move)]

    def _move(self) -> None:
        """Run all that is not a program for the model."""
        idle = _idle(None)
        self.copy_page(0, 0)
        for block in self.read_page(0, 1):
            self.write_block(0, 0, block)
        self.restore(0, 0, self.unpack(self.pack(self.snapshot(0, 0))))
        idle.saved = self.save(idle)
        self.resume(0, idle)
        self.set_counts(idle)

    def read_chunks(
        self, chunks: Many[Chunk], allowed: Masks
    ) -> tuple[Sampled, Int[Array, "G k"], Scores | None, Int16[Array, "G T L A"]]:
        """Start a chunk of a prompt in some groups.

        Args:
          chunks: the chunks, all of one adapter, and all narrow or none.
          allowed: tokens that may be sampled after a group's chunk; any where it is missing.

        Returns:
          The tokens after the chunks, drafts, any scores, and the chosen experts.
        """
        sequences, arrays = [chunk.sequence for chunk in chunks], inputs.chunks(chunks, self.shape)
        groups = [sequence.group for sequence in sequences]
        rows = self._rows(self.shape.groups, sequences, groups, allowed)
        outputs = self._run(
            programs.prefill, sequences[0].request.adapter, rows, self._by_row(arrays)
        )
        sampled, draft_Gk, scores, expert_GTLA = outputs
        return sampled, draft_Gk, scores if arrays.scored_G.any() else None, expert_GTLA

    def fetch(self, outputs: Any) -> Any:
        """Wait for what a call returned."""
        return jax.device_get(outputs)

    def advance(
        self,
        sequences: Many[Sequence],
        allowed: Masks,
        steps: int,
    ) -> tuple[Sampled, Drafting, Int[Array, ""], Int16[Array, "B T L A"]]:
        """Start steps of rows, all of one adapter.

        Args:
          sequences: what the rows hold.
          allowed: tokens that a row may sample next, by row; any where it is missing.
          steps: most steps.

        Returns:
          The rows' tokens, new drafts, how many steps, and the experts chosen at each token.
        """
        places = [sequence.row or 0 for sequence in sequences]
        rows = self._rows(self.shape.rows, sequences, places, allowed)
        return self._run(programs.advance, sequences[0].request.adapter, rows, np.int32(steps))

    def _run(self, program: Callable[..., Any], adapter: str | None, *args: Any) -> Any:
        state = self._models[adapter], self._cache, self._counts
        self._cache, self._counts, outputs = self._call(program, *state, *args, static=self.static)
        return outputs

    def _call(self, program: Callable[..., Any], *args: Any, **static: Any) -> Any:
        with sharding.on(self._mesh):
            return program(*args, **static)

    def _by_row(self, arrays: Any) -> Any:
        """Arrays of the host, on the devices whose rows they are of."""
        mesh = self._mesh
        if mesh is None or self.shape.groups == 1:
            return arrays
        place = lambda x: sharding.place(ROWS, x.shape, mesh)
        return jax.device_put(arrays, jax.tree.map(place, arrays))

    def set_counts(self, sequence: Sequence) -> None:
        """Count the tokens of a row, for penalties."""
        vocab = self._cfg.vocab_size
        prompt, new = np.split(np.asarray(sequence.tokens), [sequence.prompt])
        counts = Counts(
            in_prompt_BV=_host(np.bincount(prompt, minlength=vocab)[None] > 0, bool),
            count_BV=_host(np.bincount(new, minlength=vocab)[None], np.int32),
        )
        self._counts = self._call(_set_row, self._counts, np.int32(sequence.row or 0), counts)

    def copy_page(self, source: int, target: int) -> None:
        pages = np.int32(source), np.int32(target)
        self._cache = self._call(paging.copy_page, self._cache, *pages)

    def read_page(self, page: int, blocks: int) -> list[bytes]:
        entries = jax.device_get(self._entries(page))
        return [self._block.pack(self._part(entries, i)) for i in range(blocks)]

    def write_block(self, page: int, position: int, block: bytes) -> None:
        self._write(page, position, self._block.unpack(block))

    def snapshot(self, row: int, length: int, *, entire: bool = False) -> paging.Snapshot:
        at, static = (np.int32(row), np.int32(length)), {"cfg": self._cfg, "entire": entire}
        return self._call(paging.snapshot, self._cache, *at, **static)

    def restore(self, row: int, length: int, snapshot: paging.Snapshot) -> None:
        at = np.int32(row), np.int32(length)
        self._cache = self._call(paging.restore, self._cache, *at, snapshot)

    def pack(self, snapshot: paging.Snapshot) -> bytes:
        return self._snapshot.pack(jax.device_get(snapshot))

    def unpack(self, content: bytes) -> paging.Snapshot:
        return jax.device_put(self._snapshot.unpack(content), self._place)

    def save(self, sequence: Sequence) -> Any:
        rings = self.snapshot(sequence.row or 0, sequence.length, entire=True)
        return jax.device_get((rings, [self._entries(page) for page in sequence.pages]))

    def resume(self, row: int, sequence: Sequence) -> None:
        rings, pages = sequence.saved
        self.restore(row, sequence.length, rings)
        for page, entries in zip(sequence.pages, pages, strict=False):
            self._write(page, 0, entries)

    def _entries(self, page: int) -> paging.Page:
        return self._call(paging.read_page, self._cache, np.int32(page))

    def _write(self, page: int, position: int, entries: paging.Page) -> None:
        at = np.int32(page), np.int32(position)
        self._cache = self._call(paging.write_entries, self._cache, *at, entries)

    def _part(self, entries: paging.Page, position: int) -> paging.Page:
        """The entries of one block of a page."""
        blocks = self.shape.page // BLOCK

        def part(x_LNK: AnyArray) -> AnyArray:
            n = x_LNK.shape[1] // blocks
            return x_LNK[:, position * n : (position + 1) * n]

        return jax.tree.map(part, entries)

    def _rows(self, count: int, sequences: Many[Sequence], at: Many[int], masks: Masks) -> Rows:
        """The rows of a call, with sequences at the given places."""
        no_rows, unmasked_BW = self._empty_rows[count]
        rows = jax.tree.map(np.copy, no_rows)
        inputs.fill(rows, sequences, at, masks, self.shape.pages // self.shape.groups)
        if not masks:
            # Masks are large: those that allow everything are on the device already.
            return dataclasses.replace(self._by_row(rows), allowed_BW=unmasked_BW)
        for row, mask_W in masks.items():
            rows.allowed_BW[row] = mask_W
        return self._by_row(rows)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The shapes of a tree of arrays, which are stored as their bytes one after the other."""

    shapes: Any

    def pack(self, arrays: Any) -> bytes:
        return b"".join(array.tobytes() for array in jax.tree.leaves(arrays))

    def unpack(self, content: bytes) -> Any:
        leaves, tree = jax.tree.flatten(self.shapes)
        arrays, at = [], 0
        for leaf in leaves:
            part = content[at : at + math.prod(leaf.shape) * leaf.dtype.itemsize]
            arrays.append(np.frombuffer(part, leaf.dtype).reshape(leaf.shape))
            at += len(part)
        return jax.tree.unflatten(tree, arrays)


def _host(value: Any, dtype: Any) -> Any:
    """An array of the host, untyped: see `arrays.AnyArray`."""
    return np.asarray(value, dtype)


def _idle(adapter: str | None) -> Sequence:
    """A sequence on the first row, whose page is scratch."""
    request = Request(tokens=(0, 0), sampling=SamplingParams(temperature=0), adapter=adapter)
    idle = Sequence.of(request, lambda _: None, {})
    idle.row, idle.length, idle.pages = 0, 1, [0]
    return idle


@jax.jit
def _set_row(counts: Counts, row: Int[Array, ""], one: Counts) -> Counts:
    put = lambda x_BV, new_1V: grouped_rows.write(x_BV, row, new_1V[0], axis=0)
    return jax.tree.map(put, counts, one)
