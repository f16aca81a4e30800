"""The engine's arrays and the programs that run on them.

Axis letters: as in `v4jax.engine.programs`.
"""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, UInt32

from v4jax.decoding import sampling
from v4jax.decoding.sampling import SamplingParams
from v4jax.engine import programs
from v4jax.engine.arrays import (
    AnyArray,
    ChunkArrays,
    Counts,
    Drafting,
    Rows,
    Sampled,
    Scores,
    Static,
)
from v4jax.engine.request import Request
from v4jax.engine.scheduler import Chunk
from v4jax.engine.sequence import Sequence
from v4jax.model import paging, sharding
from v4jax.model.cache import BLOCK
from v4jax.model.transformer import Model

# Stop tokens of a row, at most.
STOPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that the programs are compiled for.

    Attributes:
      rows: slots of sequences.
      pages: pages of the pools, of which one is scratch.
      page: tokens of a page.
      row_pages: most pages of a row.
      widths: tokens of a prompt's last chunk and of the others, padded to these.
    """

    rows: int
    pages: int
    page: int
    row_pages: int
    widths: tuple[int, int]


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
        vocab = static.cfg.vocab_size
        sizes = {"rows": shape.rows, "pages": shape.pages, "page": shape.page}
        cache = paging.make(static.cfg, **sizes, dtype=dtype, mtp=static.drafts > 0)
        counts = Counts(
            in_prompt_BV=jnp.zeros((shape.rows, vocab), bool),
            count_BV=jnp.zeros((shape.rows, vocab), jnp.int32),
        )
        # Where the weights are: programs would be compiled again once their outputs are there.
        self._mesh = sharding.mesh_of(models[None])
        self._place = jax.devices()[0] if self._mesh is None else NamedSharding(self._mesh, P())
        self._cache, self._counts = jax.device_put((cache, counts), self._place)
        self._block = _Layout(jax.eval_shape(self._read_block))
        self._snapshot = _Layout(jax.eval_shape(lambda: self.snapshot(0, 0)))
        # For a chunk's one row, and for all rows.
        unmasked = lambda rows: jnp.full((rows, -(-vocab // 32)), 0xFFFFFFFF, jnp.uint32)
        self._unmasked = {rows: unmasked(rows) for rows in (1, shape.rows)}
        greedy = SamplingParams(temperature=0, seed=0)
        self._greedy = _settings([greedy] * shape.rows, vocab)

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
        request = Request(tokens=(0, 0), sampling=SamplingParams(temperature=0))
        idle = Sequence.of(request, lambda _: None, {})
        idle.row, idle.length, idle.pages = 0, 1, [0]

        def read(count: int, *, narrow: bool) -> Callable[[], Any]:
            return lambda: self.read_chunk(Chunk(idle, 0, count, narrow), None)

        def move_page() -> None:
            self.copy_page(0, 0)
            for block in self.read_page(0, 1):
                self.write_block(0, 0, block)

        def move_row() -> None:
            self.restore(0, 0, self.unpack(self.pack(self.snapshot(0, 0))))
            idle.saved = self.save(idle)
            self.resume(0, idle)
            self.set_counts(idle)

        return [
            (f"chunks of {self.shape.widths[0]} tokens", read(1, narrow=True)),
            (f"chunks of {self.shape.widths[1]} tokens", read(1, narrow=False)),
            ("steps", lambda: self.advance([idle], {}, 1)),
            ("copies of pages", move_page),
            ("copies of rows", move_row),
        ]

    def read_chunk(
        self, chunk: Chunk, allowed_W: UInt32[np.ndarray, " W"] | None
    ) -> tuple[Sampled, Int[Array, "B k"], Scores | None]:
        """Start a chunk of a prompt; the token after it, its drafts, and any scores."""
        sequence = chunk.sequence
        width = self.shape.widths[0 if chunk.narrow else 1]
        part = sequence.tokens[chunk.start : chunk.start + chunk.count + 1]
        scored = sequence.request.prompt_logprobs
        arrays = ChunkArrays(
            row=_host(sequence.row or 0, np.int32),
            count=_host(chunk.count, np.int32),
            last=_host(chunk.last, bool),
            scored=_host(scored, bool),
            tokens_T=_padded(part[: chunk.count], width),
            next_T=_padded(part[1:], width),
        )
        row = self._rows([sequence], {} if allowed_W is None else {0: allowed_W}, [0], count=1)
        sampled, draft_1k, scores = self._run(
            programs.prefill, sequence.request.adapter, row, arrays
        )
        return sampled, draft_1k, scores if scored else None

    def fetch(self, outputs: Any) -> Any:
        """Wait for what a call returned."""
        return jax.device_get(outputs)

    def advance(
        self,
        sequences: Many[Sequence],
        allowed: dict[int, UInt32[np.ndarray, " W"]],
        steps: int,
    ) -> tuple[Sampled, Drafting, Int[Array, ""]]:
        """Start steps of rows, all of one adapter; their tokens, new drafts, and how many steps.

        Args:
          sequences: what the rows hold.
          allowed: tokens that a row may sample next, by row; any where it is missing.
          steps: most steps.
        """
        at = [sequence.row or 0 for sequence in sequences]
        rows = self._rows(sequences, allowed, at, count=self.shape.rows)
        return self._run(programs.advance, sequences[0].request.adapter, rows, np.int32(steps))

    def _run(self, program: Callable[..., Any], adapter: str | None, *args: Any) -> Any:
        with sharding.on(self._mesh):
            state = self._models[adapter], self._cache, self._counts
            self._cache, self._counts, outputs = program(*state, *args, static=self.static)
        return outputs

    def set_counts(self, sequence: Sequence) -> None:
        """Count the tokens of a row, for penalties."""
        vocab = self._cfg.vocab_size
        prompt, new = np.split(np.asarray(sequence.tokens), [sequence.prompt])
        counts = Counts(
            in_prompt_BV=_host(np.bincount(prompt, minlength=vocab)[None] > 0, bool),
            count_BV=_host(np.bincount(new, minlength=vocab)[None], np.int32),
        )
        self._counts = _set_row(self._counts, np.int32(sequence.row or 0), counts)

    def copy_page(self, source: int, target: int) -> None:
        self._cache = paging.copy_page(self._cache, np.int32(source), np.int32(target))

    def read_page(self, page: int, blocks: int) -> list[bytes]:
        entries = jax.device_get(paging.read_page(self._cache, np.int32(page)))
        return [self._block.pack(self._part(entries, i)) for i in range(blocks)]

    def write_block(self, page: int, position: int, block: bytes) -> None:
        entries = self._block.unpack(block)
        at = np.int32(page), np.int32(position)
        self._cache = paging.write_entries(self._cache, *at, entries)

    def snapshot(self, row: int, length: int) -> paging.Snapshot:
        at = np.int32(row), np.int32(length)
        return paging.snapshot(self._cache, *at, cfg=self._cfg)

    def restore(self, row: int, length: int, snapshot: paging.Snapshot) -> None:
        self._cache = paging.restore(self._cache, np.int32(row), np.int32(length), snapshot)

    def pack(self, snapshot: paging.Snapshot) -> bytes:
        return self._snapshot.pack(jax.device_get(snapshot))

    def unpack(self, content: bytes) -> paging.Snapshot:
        return jax.device_put(self._snapshot.unpack(content), self._place)

    def save(self, sequence: Sequence) -> Any:
        at = np.int32(sequence.row or 0), np.int32(sequence.length)
        rings = paging.snapshot(self._cache, *at, cfg=self._cfg, entire=True)
        pages = [paging.read_page(self._cache, np.int32(page)) for page in sequence.pages]
        return jax.device_get((rings, pages))

    def resume(self, row: int, sequence: Sequence) -> None:
        rings, pages = sequence.saved
        self.restore(row, sequence.length, rings)
        for page, entries in zip(sequence.pages, pages, strict=False):
            self._cache = paging.write_entries(self._cache, np.int32(page), np.int32(0), entries)

    def _read_block(self) -> paging.Page:
        return self._part(paging.read_page(self._cache, np.int32(0)), 0)

    def _part(self, entries: paging.Page, position: int) -> paging.Page:
        """The entries of one block of a page."""
        blocks = self.shape.page // BLOCK

        def part(x_LNK: AnyArray) -> AnyArray:
            n = x_LNK.shape[1] // blocks
            return x_LNK[:, position * n : (position + 1) * n]

        return jax.tree.map(part, entries)

    def _rows(
        self,
        sequences: Many[Sequence],
        allowed: dict[int, UInt32[np.ndarray, " W"]],
        at: list[int],
        *,
        count: int,
    ) -> Rows:
        """The rows of a call, with the sequences at the given places."""
        width = self.static.drafts

        def zeros(*shape: int, dtype: Any = np.int32) -> Any:
            return np.zeros((count, *shape), dtype)

        fields = {name: zeros() for name in ("token_B", "length_B", "left_B")}
        stop_BE, table_BM = zeros(STOPS) - 1, zeros(self.shape.row_pages + 1)
        settings = {name: values[:count].copy() for name, values in self._greedy.items()}
        drafting: Any = Drafting(
            draft_Bk=zeros(width),
            count_B=zeros(),
            allowed_B=zeros(dtype=bool),
            share_B=zeros(dtype=np.float32),
            rest_B=zeros(),
            drafted_B=zeros(),
            right_B=zeros(),
        )
        for b, sequence in zip(at, sequences, strict=True):
            fields["token_B"][b] = sequence.tokens[-1]
            fields["length_B"][b] = sequence.length
            fields["left_B"][b] = sequence.left
            stop_BE[b, : len(sequence.request.stop_tokens)] = sequence.request.stop_tokens
            table_BM[b, : len(sequence.pages)] = sequence.pages
            drafting.allowed_B[b] = b not in allowed
            drafting.share_B[b], drafting.rest_B[b] = sequence.acceptance, sequence.rest
            if sequence.drafts and b not in allowed:
                drafting.draft_Bk[b], drafting.count_B[b] = sequence.drafts, width
            for name, values in sequence.settings.items():
                settings[name][b] = values[0]
            settings["drawn_B"][b] = sequence.sampled
        return Rows(
            **fields,
            stop_BE=stop_BE,
            table_BM=table_BM,
            allowed_BW=self._masks(allowed, count),
            drafting=drafting,
            settings=settings,
        )

    def _masks(self, allowed: dict[int, UInt32[np.ndarray, " W"]], count: int) -> Any:
        """The masks of all rows; without any, an array that is on the device already."""
        if not allowed:
            return self._unmasked[count]
        allowed_BW = np.full(self._unmasked[count].shape, 0xFFFFFFFF, np.uint32)
        for row, mask_W in allowed.items():
            allowed_BW[row] = mask_W
        return allowed_BW


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


def _padded(tokens: Many[int], width: int) -> Any:
    padded_T = np.zeros(width, np.int32)
    padded_T[: len(tokens)] = tokens
    return padded_T


def _settings(params: Many[SamplingParams], vocab: int) -> dict[str, Any]:
    """Sampling settings of rows that have drawn nothing."""
    return {**sampling.settings(params, vocab), "drawn_B": np.zeros(len(params), np.int32)}


@jax.jit
def _set_row(counts: Counts, row: Int[Array, ""], one: Counts) -> Counts:
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, 0)
    return jax.tree.map(put, counts, one)
