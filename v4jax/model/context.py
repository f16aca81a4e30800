"""What all layers of a forward pass share: settings, positions and rotary tables.

Axis letters: B batch, T tokens, P rotary pairs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from v4jax.model import layers
from v4jax.model.cache import BLOCK
from v4jax.model.config import LayerKind, ModelConfig
from v4jax.model.numerics import Numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The tokens of one call; in each row, `count` of T are real, the first at position `start`.

    If a row holds several documents, each begins at a multiple of `cache.BLOCK` tokens, so that no
    compressed window spans two of them, and `first_BT` says where each token's document begins.
    `watch_indexer` makes sparse attention return its indexer's divergence. If pools are pages,
    `table_BM` holds those of each row.
    """

    cfg: ModelConfig
    numerics: Numerics
    tokens_BT: Int[Array, "B T"]
    start_B: Int[Array, " B"]
    count_B: Int[Array, " B"]
    rope_sliding: tuple[Any, Any]
    rope_compressed: tuple[Any, Any]
    first_BT: Int[Array, "B T"] | None = None
    document_BT: Int[Array, "B T"] | None = None
    watch_indexer: bool = False
    table_BM: Int[Array, "B M"] | None = None

    @property
    def end_B(self) -> Int[Array, " B"]:
        return self.start_B + self.count_B

    @property
    def position_BT(self) -> Int[Array, "B T"]:
        return positions(self.start_B, self.tokens_BT.shape[1])

    @property
    def real_BT(self) -> Bool[Array, "B T"]:
        """False for padding, which comes after the real tokens of a row or of a document."""
        if self.document_BT is not None:
            return self.document_BT > 0
        return jnp.arange(self.tokens_BT.shape[1])[None] < self.count_B[:, None]

    def rope(self, kind: LayerKind) -> tuple[Any, Any]:
        return self.rope_sliding if kind.attention == "sliding" else self.rope_compressed


def positions(start_B: Int[Array, " B"], tokens: int) -> Int[Array, "B T"]:
    """start, start + 1, ... for each row."""
    return start_B[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]


def make(
    cfg: ModelConfig,
    numerics: Numerics,
    tokens_BT: Int[Array, "B T"],
    start_B: Int[Array, " B"],
    count_B: Int[Array, " B"],
    dtype: Any,
    *,
    document_BT: Int[Array, "B T"] | None = None,
    table_BM: Int[Array, "B M"] | None = None,
) -> Context:
    """The context of a pass over `tokens_BT`, with activations in `dtype`.

    `document_BT`, 0 at padding, is for rows of several documents; these rows begin at position 0.
    `table_BM` is the cache's.

    Raises:
      ValueError: `document_BT` is given, but the model's compressed windows would mix documents.
    """
    position_BT = positions(start_B, tokens_BT.shape[1])
    first_BT = None
    if document_BT is not None:
        check_packing(cfg)
        first_BT = firsts(document_BT)
        position_BT -= first_BT
    table = lambda compressed: layers.rope_table(
        position_BT, cfg, numerics, dtype, compressed=compressed
    )
    return Context(
        cfg=cfg,
        numerics=numerics,
        tokens_BT=tokens_BT,
        start_B=start_B,
        count_B=count_B,
        rope_sliding=table(False),
        rope_compressed=table(True),
        first_BT=first_BT,
        document_BT=document_BT,
        table_BM=table_BM,
    )


def check_packing(cfg: ModelConfig) -> None:
    """Reject models whose compressed windows may span two packed documents.

    Raises:
      ValueError: a compression ratio does not divide the documents' alignment.
    """
    ratios = {kind.ratio for kind in cfg.layers if kind.ratio}
    if wrong := sorted(ratio for ratio in ratios if BLOCK % ratio):
        raise ValueError(
            f"Documents are packed at multiples of {BLOCK} tokens, which a compression ratio of"
            f" {wrong[0]} (compress_ratios in config.json) does not divide: an entry would mix two"
            f" documents. Only models whose ratios divide {BLOCK} can be trained on packed rows."
        )


def of_next(context: Context) -> Context:
    """The context of each position's next token; padding if its document has none."""
    shifted = lambda x_BT: jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))
    document_BT = context.document_BT
    if document_BT is None:
        document_BT = context.real_BT.astype(jnp.int32)
    document_BT = jnp.where(shifted(document_BT) == document_BT, document_BT, 0)
    return dataclasses.replace(
        context, tokens_BT=shifted(context.tokens_BT), document_BT=document_BT
    )


def firsts(document_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where each token's document begins; padding counts with the document before it."""
    before_BT = jnp.pad(document_BT[:, :-1], ((0, 0), (1, 0)))
    begins_BT = (document_BT != before_BT) & (document_BT > 0)
    at_BT = jnp.where(begins_BT, jnp.arange(document_BT.shape[1], dtype=jnp.int32)[None], 0)
    return jax.lax.cummax(at_BT, axis=1)
