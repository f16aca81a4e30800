"""The engine's step on a mesh: each group of devices has its rows, and its own part of the pages.

A group's tables number its own pages; a single device finds the same pages further on in its pools.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import models
from v4jax.decoding import sampling
from v4jax.decoding.sampling import SamplingParams
from v4jax.engine import programs
from v4jax.engine.arrays import Counts, Drafting, Rows, Sampled, Static
from v4jax.model import cache as caches
from v4jax.model import numerics, paging, sharding
from v4jax.model.cache import Cache
from v4jax.model.transformer import Model

CFG = models.config(models.SLIDING, models.CSA, models.HCA)
ROWS, PAGE, ROW_PAGES, GROUPS, STEPS = 8, 128, 2, 4, 3
PAGES = ROWS // GROUPS * ROW_PAGES + 1  # of a group


def rows(table_BM: np.ndarray) -> Rows:
    """Rows that complete entries in these steps; one goes on in its second page."""

    def zeros(*shape: int, dtype: Any = np.int32) -> Any:
        return jnp.zeros((ROWS, *shape), dtype)

    fields: dict[str, Any] = {name: zeros() for name in ("count_B", "drafted_B", "right_B")}
    drafting = Drafting(
        **fields,
        draft_Bk=zeros(0),
        allowed_B=zeros(dtype=bool),
        share_B=zeros(dtype=np.float32),
        rest_B=zeros(),
    )
    params = [SamplingParams(seed=n) for n in range(ROWS)]
    settings: dict[str, Any] = sampling.settings(params, CFG.vocab_size)
    allowed_BW = jnp.full((ROWS, CFG.vocab_size // 32), 0xFFFFFFFF, jnp.uint32)
    return Rows(
        token_B=jnp.arange(ROWS, dtype=jnp.int32),
        length_B=jnp.array([126, 3, 200, 125, 0, 127, 61, 253], jnp.int32),
        left_B=jnp.full(ROWS, 99, jnp.int32),
        stop_BE=zeros(1) - 1,
        table_BM=jnp.asarray(table_BM, jnp.int32),
        allowed_BW=allowed_BW.at[2].set(0x0F0F0F0F),
        drafting=drafting,
        settings={**settings, "drawn_B": zeros()},
    )


def advanced(model: Model, table_BM: np.ndarray, mesh: Any) -> tuple[Cache, Sampled]:
    """Cache and tokens after some steps, from a cache of random numbers."""
    empty = paging.make(CFG, rows=ROWS, pages=GROUPS * PAGES, page=PAGE, dtype=jnp.float32)
    leaves, tree = jax.tree.flatten(empty)
    draw = lambda i, x: x if x.ndim == 1 else jax.random.normal(jax.random.key(i), x.shape)
    cache = jax.tree.unflatten(tree, [draw(*pair) for pair in enumerate(leaves)])
    counts = Counts(
        in_prompt_BV=jnp.zeros((ROWS, CFG.vocab_size), bool),
        count_BV=jnp.zeros((ROWS, CFG.vocab_size), jnp.int32),
    )
    static = Static(cfg=CFG, numerics=numerics.HF, drafts=0, top=2)
    if mesh is not None:
        model = jax.device_put(model, sharding.shardings(Model(CFG), mesh, model))
        cache = jax.tree.map(lambda x: jax.device_put(x, caches.place(x.shape, mesh)), cache)
    with sharding.on(mesh):
        cache, _, (sampled, _, steps, _) = programs.advance(
            model, cache, counts, rows(table_BM), jnp.int32(STEPS), static=static
        )
    assert steps == STEPS
    return jax.device_get((cache, jax.tree.map(lambda x: x[:, :STEPS], sampled)))


def test_groups_of_devices_step_as_one_device_does() -> None:
    model = models.weights(CFG)
    table_BM = 1 + np.arange(ROWS * ROW_PAGES).reshape(ROWS, ROW_PAGES) % (PAGES - 1)
    first_B1 = np.repeat(np.arange(GROUPS), ROWS // GROUPS)[:, None] * PAGES
    mesh = sharding.make_mesh(data=2, expert=2, tensor=2)
    (cache, sampled), (expected_cache, expected) = (
        advanced(model, *case) for case in [(table_BM, mesh), (table_BM + first_B1, None)]
    )
    np.testing.assert_array_equal(sampled.token_BT, expected.token_BT)
    np.testing.assert_array_equal(sampled.top_id_BTN, expected.top_id_BTN)
    np.testing.assert_allclose(sampled.logprob_BT, expected.logprob_BT, atol=1e-5)
    assert sampled.real_BT.all()
    pages = np.arange(GROUPS * PAGES) % PAGES != paging.SCRATCH
    pairs = zip(
        jax.tree.leaves(cache.segments), jax.tree.leaves(expected_cache.segments), strict=True
    )
    for ours, theirs in pairs:
        of_rows = pages if ours.shape[1] == len(pages) else slice(None)
        np.testing.assert_allclose(ours[:, of_rows], theirs[:, of_rows], atol=1e-5)
