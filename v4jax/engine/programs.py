"""The engine's compiled programs: chunks of prompts, one a group of rows, and steps of all rows.

The host owns every integer and passes it with each call, so that admitting, rewinding or ending a
row is bookkeeping; the device owns the cache and the counts of tokens. A row takes up to k drafts:
it is then sampled at 1 + k positions, from the same draws as without drafts, and goes on while the
draft was the token sampled. So drafts change nothing but speed.

Axis letters: B rows, T tokens, V vocabulary, W words of a bitmask, M pages of a row, E stop tokens,
N alternatives reported per token, k drafts, S steps of a call, D hidden, H streams, G groups of
rows, L layers, A experts per token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int16, Shaped

from v4jax.decoding import sampling
from v4jax.decoding.sampling import SamplingState
from v4jax.engine.arrays import Chunks, Counts, Drafting, Rows, Sampled, Scores, Static
from v4jax.model import context, grouped_rows, paging, sharding, transformer
from v4jax.model.cache import BLOCK, Cache
from v4jax.model.transformer import Model

# Most steps of one call of `advance`.
STEPS = 64
# Below this share of right drafts, a row takes none for so many tokens.
_FEW_RIGHT, _REST = 0.25, 64
# Positions that are scored at once; divides the width of every chunk.
_SCORED = 64


_program = functools.partial(jax.jit, static_argnames="static", donate_argnames=("cache", "counts"))


@_program
def prefill(
    model: Model,
    cache: Cache,
    counts: Counts,
    rows: Rows,
    chunks: Chunks,
    *,
    static: Static,
) -> tuple[Cache, Counts, tuple[Sampled, Int[Array, "G k"], Scores, Int16[Array, "G T L A"]]]:
    """Add a chunk of a prompt to one row of each group, and sample the token after it.

    Args:
      model: the weights.
      cache: the cache; its length and table are not used.
      counts: tokens of all rows.
      rows: those rows only, of `length` tokens before the chunk.
      chunks: the chunks.
      static: what the program is compiled for.

    Returns:
      The cache, the counts, the sampled token with the drafts that follow it, the scores, which
      are zeros if none were asked for, and the experts chosen for the chunk.
    """
    cfg, row_G, count_G = static.cfg, chunks.row_G, chunks.count_G
    taken = paging.take(cache, row_G, rows.length_B, rows.table_BM)
    x_GTM, taken, expert_GTLA = _forward(model, chunks.tokens_GT, taken, count_G, static)
    last_G11 = jnp.maximum(count_G - 1, 0)[:, None, None]
    x_G1M = jnp.take_along_axis(x_GTM, last_G11, axis=1)
    logits_G1V = transformer.head(model, transformer.hidden(model, cfg, x_G1M))
    old = jax.tree.map(lambda x_BV: grouped_rows.read_each(x_BV, row_G, axis=0), counts)
    sampled, new, _ = _sample(logits_G1V, old, rows, static)
    new = jax.tree.map(functools.partial(_where_rows, chunks.last_G), new, old)
    into_rows = lambda x_BV, new_GV: grouped_rows.write_each(x_BV, row_G, new_GV, axis=0)
    counts = jax.tree.map(into_rows, counts, new)
    draft_Gk = rows.drafting.draft_Bk
    if static.drafts:
        # A prefix must not depend on what followed it: no draft sees the token after a block.
        at_GT = context.positions(rows.length_B, chunks.tokens_GT.shape[1])
        next_GT = jnp.where((at_GT + 1) % BLOCK == 0, 0, chunks.next_GT)
        ends_GT = (at_GT + 1 == (rows.length_B + count_G)[:, None]) & chunks.last_G[:, None]
        next_GT = jnp.where(ends_GT, sampled.token_BT, next_GT)
        draft_Gk, taken = _draft(model, x_GTM, next_GT, taken, (rows.length_B, count_G), static)
    scores = _empty_scores(chunks.next_GT.shape, static)
    if static.scores:
        score = lambda x_GTM, next_GT, _: _scores(model, x_GTM, next_GT, static)
        inputs = x_GTM, chunks.next_GT, scores
        scores = jax.lax.cond(jnp.any(chunks.scored_G), score, lambda *args: args[2], *inputs)
    cache = paging.put(cache, row_G, taken, count_G > 0)
    return *_in_place(cache, counts), (sampled, draft_Gk, scores, expert_GTLA)


@_program
def advance(
    model: Model,
    cache: Cache,
    counts: Counts,
    rows: Rows,
    steps: Int[Array, ""],
    *,
    static: Static,
) -> tuple[Cache, Counts, tuple[Sampled, Drafting, Int[Array, ""], Int16[Array, "B _ L A"]]]:
    """Run up to `steps` (at most STEPS) steps of all rows, fewer as soon as a row ends.

    Args:
      model: the weights.
      cache: the cache; its length and table are not used.
      counts: tokens of all rows.
      rows: the rows; those with nothing left to generate do not take part.
      steps: number of steps.
      static: what the program is compiled for.

    Returns:
      The cache, the counts, the tokens [B, S * (1 + k)] of all steps, the drafts that follow them,
      the number of steps, and for each token the experts chosen where it was sampled.
    """

    def step(carry):
        n, cache, counts, now, block = carry
        cache, counts, now, outputs = _step(model, cache, counts, now, static)
        put = lambda block, new: jax.lax.dynamic_update_slice_in_dim(
            block, new, n * (1 + static.drafts), 1
        )
        return n + 1, cache, counts, now, jax.tree.map(put, block, outputs)

    def go_on(carry):
        n, _, _, now, _ = carry
        ended_B = (rows.left_B > 0) & (now.left_B <= 0)
        return (n < jnp.minimum(steps, STEPS)) & ~jnp.any(ended_B)

    shape = rows.token_B.shape[0], STEPS * (1 + static.drafts)
    sampled = Sampled(
        real_BT=jnp.zeros(shape, bool),
        token_BT=jnp.zeros(shape, jnp.int32),
        logprob_BT=jnp.zeros(shape, jnp.float32),
        top_id_BTN=jnp.zeros((*shape, static.top), jnp.int32),
        top_logprob_BTN=jnp.zeros((*shape, static.top), jnp.float32),
    )
    carry = jnp.int32(0), cache, counts, rows, (sampled, _no_experts(shape, static))
    n, cache, counts, now, (sampled, expert_BTLA) = jax.lax.while_loop(go_on, step, carry)
    return *_in_place(cache, counts), (sampled, now.drafting, n, expert_BTLA)


def _in_place(cache: Cache, counts: Counts) -> tuple[Cache, Counts]:
    """Each row on the devices that it came from: the next call would be another program else."""

    def constrain(x: Array, axis: int) -> Array:
        axes = ("batch" if dim == axis else None for dim in range(x.ndim))
        return sharding.constrain(x, *axes)

    cache = jax.tree.map(lambda x: constrain(x, min(x.ndim - 1, 1)), cache)
    return cache, jax.tree.map(lambda x: constrain(x, 0), counts)


def _forward(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    cache: Cache,
    count_B: Int[Array, " B"],
    static: Static,
) -> tuple[Float[Array, "B T M"], Cache, Int16[Array, "B T L A"]]:
    """The backbone over a chunk of each row, and the experts chosen, if they can be reported."""
    chosen = lambda _kind, trace, _context: trace.routing.expert_BTA.astype(jnp.int16)
    x_BTM, cache, watched = transformer.forward(
        *(model, static.cfg, static.numerics, tokens_BT, cache, count_B),
        watch=chosen if static.experts else None,
    )
    if not static.experts:
        return x_BTM, cache, _no_experts(tokens_BT.shape, static)
    return x_BTM, cache, jnp.moveaxis(transformer.by_layer(watched), 0, 2)


def _no_experts(shape: tuple[int, ...], static: Static) -> Int16[Array, "B T L A"]:
    layers = len(static.cfg.layers) if static.experts else 0
    return jnp.zeros((*shape, layers, static.cfg.num_experts_per_tok), jnp.int16)


def _step(
    model: Model, cache: Cache, counts: Counts, rows: Rows, static: Static
) -> tuple[Cache, Counts, Rows, tuple[Sampled, Int16[Array, "B T L A"]]]:
    """One step of all rows: run the newest token and its drafts, sample, draft anew."""
    cfg = static.cfg
    drafting, goes_B = rows.drafting, rows.left_B > 0
    tokens_BT = jnp.concatenate([rows.token_B[:, None], drafting.draft_Bk], axis=1)
    count_B = jnp.where(goes_B, 1 + drafting.count_B, 0)
    cache = dataclasses.replace(cache, length_B=rows.length_B, table_BM=rows.table_BM)
    x_BTM, cache, expert_BTLA = _forward(model, tokens_BT, cache, count_B, static)
    cache = dataclasses.replace(cache, table_BM=None)
    logits_BTV = transformer.head(model, transformer.hidden(model, cfg, x_BTM))
    sampled, counts, left_B = _sample(logits_BTV, counts, rows, static)
    new_B = jnp.sum(sampled.real_BT, axis=1, dtype=jnp.int32)
    newest_B1 = jnp.take_along_axis(sampled.token_BT, jnp.maximum(new_B - 1, 0)[:, None], axis=1)
    if static.drafts:
        drafting = _judged(drafting, new_B, goes_B)
        count_B = jnp.where(_takes_drafts(drafting), new_B, 0)
        skip = lambda cache: (drafting.draft_Bk, cache)
        draft = lambda cache: _draft(
            model, x_BTM, sampled.token_BT, cache, (rows.length_B, count_B), static
        )
        draft_Bk, cache = jax.lax.cond(jnp.any(count_B > 0), draft, skip, cache)
        count_B = jnp.where(count_B > 0, static.drafts, 0)
        drafting = dataclasses.replace(drafting, draft_Bk=draft_Bk, count_B=count_B)
    rows = dataclasses.replace(
        rows,
        token_B=jnp.where(new_B > 0, newest_B1[:, 0], rows.token_B),
        length_B=rows.length_B + new_B,
        left_B=left_B,
        drafting=drafting,
        settings={**rows.settings, "drawn_B": rows.settings["drawn_B"] + new_B},
    )
    return cache, counts, rows, (sampled, expert_BTLA)


def _takes_drafts(drafting: Drafting) -> Bool[Array, " B"]:
    return drafting.allowed_B & (drafting.rest_B == 0)


def _judged(drafting: Drafting, new_B: Int[Array, " B"], goes_B: Bool[Array, " B"]) -> Drafting:
    """Count the drafts of a step that sampled `new_B` tokens, and rest where few were right."""
    drafted_B = jnp.where(goes_B, drafting.count_B, 0)
    right_B = jnp.where(drafted_B > 0, new_B - 1, 0)
    share_B = right_B / jnp.maximum(drafted_B, 1)
    change_B = jnp.where(drafted_B > 0, 0.1 * (share_B - drafting.share_B), 0.0)
    share_B = drafting.share_B + change_B
    few_B = share_B < _FEW_RIGHT
    return dataclasses.replace(
        drafting,
        share_B=jnp.where(few_B, 2 * _FEW_RIGHT, share_B),
        rest_B=jnp.where(few_B, _REST, jnp.maximum(drafting.rest_B - new_B, 0)),
        drafted_B=drafting.drafted_B + drafted_B,
        right_B=drafting.right_B + right_B,
    )


def _sample(
    logits_BTV: Float32[Array, "B T V"], counts: Counts, rows: Rows, static: Static
) -> tuple[Sampled, Counts, Int[Array, " B"]]:
    """Sample each row at T positions, for as long as its drafts are right.

    Returns:
      The tokens, the counts with them, and what each row may still generate: 0 if it has ended.
    """
    draft_BT = jnp.pad(rows.drafting.draft_Bk, ((0, 0), (0, 1)))[:, : logits_BTV.shape[1]]
    state = SamplingState(**rows.settings, **vars(counts))

    def at_position(carry, position):
        state, left_B, goes_B = carry
        t, logits_BV, draft_B = position
        # Without it, sums would be fused, and rounded, differently for each number of drafts.
        logits_BV = jax.lax.optimization_barrier(logits_BV)
        token_B, logprob_B, top, counted = sampling.sample(
            logits_BV, state, top_logprobs=static.top, allowed_BW=rows.allowed_BW
        )
        finite_B = jnp.all(jnp.isfinite(logits_BV), axis=-1)
        sampled = goes_B, token_B, jnp.where(finite_B, logprob_B, jnp.nan), *top
        ends_B = ~finite_B | jnp.any(rows.stop_BE == token_B[:, None], axis=1)
        left_B = jnp.where(goes_B, jnp.where(ends_B, 0, left_B - 1), left_B)
        state = jax.tree.map(functools.partial(_where_rows, goes_B), counted, state)
        goes_B &= (t < rows.drafting.count_B) & (token_B == draft_B) & (left_B > 0)
        return (state, left_B, goes_B), sampled

    positions = jnp.arange(draft_BT.shape[1]), jnp.swapaxes(logits_BTV, 0, 1), draft_BT.T
    carry = state, rows.left_B, rows.left_B > 0
    (state, left_B, _), sampled = jax.lax.scan(at_position, carry, positions)
    sampled = Sampled(*(jnp.swapaxes(x, 0, 1) for x in sampled))
    return sampled, Counts(in_prompt_BV=state.in_prompt_BV, count_BV=state.count_BV), left_B


def _empty_scores(shape: tuple[int, ...], static: Static) -> Scores:
    zeros = lambda dtype, *more: jnp.zeros((*shape, *more), dtype)
    return Scores(zeros(jnp.float32), zeros(jnp.int32, static.top), zeros(jnp.float32, static.top))


def _scores(
    model: Model, x_GTM: Float[Array, "G T M"], next_GT: Int[Array, "G T"], static: Static
) -> Scores:
    """Score the token after each position, a few at a time: all their logits would be large."""

    def some(x_next: tuple[Float[Array, "G t M"], Int[Array, "G t"]]) -> Scores:
        x_GtM, next_Gt = x_next
        hidden_GtD = transformer.hidden(model, static.cfg, x_GtM)
        logprob_GtV = jax.nn.log_softmax(transformer.head(model, hidden_GtD))
        top_GtN, top_id_GtN = jax.lax.top_k(logprob_GtV, static.top)
        next_logprob_Gt1 = jnp.take_along_axis(logprob_GtV, next_Gt[..., None], axis=-1)
        return Scores(next_logprob_Gt1[..., 0], top_id_GtN, top_GtN)

    def parts(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(x.shape[0], -1, _SCORED, *x.shape[2:]), 0, 1)

    def whole(x: Array) -> Array:
        return jnp.swapaxes(x, 0, 1).reshape(*next_GT.shape, *x.shape[3:])

    return jax.tree.map(whole, jax.lax.map(some, (parts(x_GTM), parts(next_GT))))


def _where_rows(
    rows_B: Bool[Array, " B"], new: Shaped[Array, "B ..."], old: Shaped[Array, "B ..."]
) -> Shaped[Array, "B ..."]:
    return jnp.where(rows_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _draft(
    model: Model,
    x_BTM: Float[Array, "B T M"],
    next_BT: Int[Array, "B T"],
    cache: Cache,
    chunk: tuple[Int[Array, " B"], Int[Array, " B"]],
    static: Static,
) -> tuple[Int[Array, "B k"], Cache]:
    """Draft k tokens after a chunk.

    Args:
      model: the weights.
      x_BTM: the backbone's streams at the chunk's positions.
      next_BT: the token after each of them.
      cache: the cache.
      chunk: position of each row's first token, and the number of its tokens.
      static: what the program is compiled for.
    """
    start_B, count_B = chunk
    drafts = []
    for _ in range(static.drafts):
        hidden_BTD, x_BTM, cache = transformer.draft(
            *(model, static.cfg, static.numerics, x_BTM, next_BT, cache),
            start_B=start_B,
            count_B=count_B,
        )
        last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
        newest = lambda x_BTK, at_B11=last_B11: jnp.take_along_axis(x_BTK, at_B11, axis=1)
        next_BT = jnp.argmax(transformer.head(model, newest(hidden_BTD)), axis=-1)
        next_BT = next_BT.astype(jnp.int32)
        drafts.append(next_BT[:, 0])
        x_BTM, start_B = newest(x_BTM), start_B + count_B
        count_B = jnp.minimum(count_B, 1)
    return jnp.stack(drafts, axis=1), cache
