"""What goes into the engine's programs and comes out of them.

Axis letters: B rows, T tokens, V vocabulary, W words of a bitmask, M pages of a row, E stop tokens,
N alternatives reported per token, k drafts, G groups of rows.
"""

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Shaped, UInt32

from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.pytree import pytree

# Programs take arrays of the host too, for which a type checker would need a case everywhere.
if TYPE_CHECKING:
    AnyArray = Array
else:
    AnyArray = Array | np.ndarray


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Tokens of each row, for penalties: which are in the prompt, how often each was generated."""

    in_prompt_BV: Bool[AnyArray, "B V"]
    count_BV: Int[AnyArray, "B V"]


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting:
    """The drafts of each row.

    A row in which few drafts are right takes none for a while: both depend on its own tokens only.

    Attributes:
      draft_Bk: drafts of the tokens after the newest.
      count_B: how many of them there are, 0 or k.
      allowed_B: whether the row may take drafts.
      share_B: share of its drafts that were right, recent ones counting more.
      rest_B: tokens for which it takes none.
      drafted_B, right_B: drafts that the call has verified, and those that were right.
    """

    draft_Bk: Int[AnyArray, "B k"]
    count_B: Int[AnyArray, " B"]
    allowed_B: Bool[AnyArray, " B"]
    share_B: Float32[AnyArray, " B"]
    rest_B: Int[AnyArray, " B"]
    drafted_B: Int[AnyArray, " B"]
    right_B: Int[AnyArray, " B"]


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What the host says about each row.

    Attributes:
      token_B: newest token, not yet in the cache.
      length_B: tokens in the cache.
      left_B: tokens that may still be generated; 0 for a row that does not take part.
      stop_BE: tokens that end the row; -1 for none.
      table_BM: the row's pages, by their numbers in its group.
      allowed_BW: tokens that may be sampled next, as bits; all ones where nothing restricts them.
      drafting: drafts, and whether there may be more.
      settings: fields of `SamplingState`, but for the counts.
    """

    token_B: Int[AnyArray, " B"]
    length_B: Int[AnyArray, " B"]
    left_B: Int[AnyArray, " B"]
    stop_BE: Int[AnyArray, "B E"]
    table_BM: Int[AnyArray, "B M"]
    allowed_BW: UInt32[AnyArray, "B W"]
    drafting: "Drafting"
    settings: dict[str, Shaped[AnyArray, "B ..."]]


@pytree
@dataclasses.dataclass(frozen=True)
class Sampled:
    """Tokens that a step sampled for each row; `real_BT` is false after a rejected draft or an end.

    `logprob_BT` is NaN where the logits were not all finite, which ends the row.
    """

    real_BT: Bool[Array, "B T"]
    token_BT: Int[Array, "B T"]
    logprob_BT: Float32[Array, "B T"]
    top_id_BTN: Int[Array, "B T N"]
    top_logprob_BTN: Float32[Array, "B T N"]


class Scores(NamedTuple):
    """Log-probabilities of the token after each of a prompt's, and the most probable ones there."""

    logprob_GT: Float32[Array, "G T"]
    top_id_GTN: Int[Array, "G T N"]
    top_logprob_GTN: Float32[Array, "G T N"]


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """A chunk of a prompt for one row of each group.

    Attributes:
      row_G: the row's number in its group.
      count_G: tokens of the chunk that are real; 0 where a group has none.
      last_G: whether it ends the prompt, so that the token sampled after it counts.
      scored_G: whether `next_GT` is scored.
      tokens_GT: the chunk.
      next_GT: the token after each of them.
    """

    row_G: Int[AnyArray, " G"]
    count_G: Int[AnyArray, " G"]
    last_G: Bool[AnyArray, " G"]
    scored_G: Bool[AnyArray, " G"]
    tokens_GT: Int[AnyArray, "G T"]
    next_GT: Int[AnyArray, "G T"]


class Static(NamedTuple):
    """What a program is compiled for, besides the shapes of its arguments.

    Attributes:
      cfg: the model's configuration.
      numerics: the rounding.
      drafts: k, the number of drafts that a row takes.
      top: N, the number of alternatives that can be reported.
      scores: whether prompts can be scored.
      experts: whether the chosen experts can be reported.
    """

    cfg: ModelConfig
    numerics: Numerics
    drafts: int
    top: int
    scores: bool = True
    experts: bool = False
