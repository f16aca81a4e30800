"""What the host passes to the engine's programs, from sequences and chunks.

Axis letters: as in `v4jax.engine.arrays`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from v4jax.decoding import sampling
from v4jax.decoding.sampling import SamplingParams
from v4jax.engine import sequence as sequences
from v4jax.engine.arrays import Chunks, Drafting, Rows, Static
from v4jax.engine.scheduler import Chunk

# Tokens that may be sampled next, by row; any where it is missing.
Masks = Mapping[int, UInt32[np.ndarray, " W"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that the programs are compiled for.

    Attributes:
      rows: slots of sequences.
      pages: pages of the pools, of which one in each group is scratch.
      page: tokens of a page.
      row_pages: most pages of a row.
      widths: tokens of a prompt's last chunk and of the others, padded to these.
      stops: most stop tokens of a row.
      groups: groups of rows, of which each has as many slots and pages.
      entries: how pages hold entries; see `paging.make`.
    """

    rows: int
    pages: int
    page: int
    row_pages: int
    widths: tuple[int, int]
    stops: int
    groups: int = 1
    entries: str | None = None


def empty_rows(count: int, shape: Shape, static: Static) -> Rows:
    """Rows that do not take part."""

    def zeros(*more: int, dtype: Any = np.int32) -> Any:
        return np.zeros((count, *more), dtype)

    vocab = static.cfg.vocab_size
    greedy = [SamplingParams(temperature=0, seed=0)] * count
    settings: dict[str, Any] = sampling.settings(greedy, vocab)
    return Rows(
        token_B=zeros(),
        length_B=zeros(),
        left_B=zeros(),
        stop_BE=zeros(shape.stops) - 1,
        table_BM=zeros(shape.row_pages),
        allowed_BW=zeros(-(-vocab // 32), dtype=np.uint32) - np.uint32(1),
        drafting=Drafting(
            draft_Bk=zeros(static.drafts),
            count_B=zeros(),
            allowed_B=zeros(dtype=bool),
            share_B=zeros(dtype=np.float32),
            rest_B=zeros(),
            drafted_B=zeros(),
            right_B=zeros(),
        ),
        settings={**settings, "drawn_B": zeros()},
    )


def fill(
    rows: Any,
    running: Sequence[sequences.Sequence],
    places: Sequence[int],
    masks: Masks,
    group_pages: int,
) -> None:
    """Set the rows at some places to what sequences need, but for their masks.

    `group_pages` is the number of pages of a group.
    """
    drafting = rows.drafting
    for b, sequence in zip(places, running, strict=True):
        rows.token_B[b] = sequence.tokens[-1]
        rows.length_B[b] = sequence.length
        rows.left_B[b] = sequence.left
        rows.stop_BE[b, : len(sequence.request.stop_tokens)] = sequence.request.stop_tokens
        rows.table_BM[b, : len(sequence.pages)] = np.asarray(sequence.pages) % group_pages
        drafting.allowed_B[b] = b not in masks
        drafting.share_B[b], drafting.rest_B[b] = sequence.acceptance, sequence.rest
        if sequence.drafts and b not in masks:
            drafting.draft_Bk[b], drafting.count_B[b] = sequence.drafts, len(sequence.drafts)
        for name, values in sequence.settings.items():
            rows.settings[name][b] = values[0]
        rows.settings["drawn_B"][b] = sequence.sampled


def empty_chunks(groups: int, width: int) -> Chunks:
    """No group's chunk."""

    def zeros(*more: int, dtype: Any = np.int32) -> Any:
        return np.zeros((groups, *more), dtype)

    return Chunks(
        row_G=zeros(),
        count_G=zeros(),
        last_G=zeros(dtype=bool),
        scored_G=zeros(dtype=bool),
        tokens_GT=zeros(width),
        next_GT=zeros(width),
    )


def chunks(parts: Sequence[Chunk], shape: Shape) -> Chunks:
    """Chunks of prompts, at most one a group, all narrow or none."""
    arrays: Any = empty_chunks(shape.groups, shape.widths[0 if parts[0].narrow else 1])
    for chunk in parts:
        sequence, g = chunk.sequence, chunk.sequence.group
        tokens = sequence.tokens[chunk.start :][: chunk.count + 1]
        arrays.row_G[g] = (sequence.row or 0) % (shape.rows // shape.groups)
        arrays.count_G[g], arrays.last_G[g] = chunk.count, chunk.last
        arrays.scored_G[g] = sequence.request.prompt_logprobs
        arrays.tokens_GT[g, : chunk.count] = tokens[: chunk.count]
        arrays.next_GT[g, : len(tokens) - 1] = tokens[1:]
    return arrays
