"""Filters against those of transformers, and against their definitions in NumPy.

Axis letters: B batch, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from v4jax.decoding import sampling
from v4jax.decoding.sampling import SamplingParams

filtered = jax.jit(sampling.filtered_logits)


def start(params: Sequence[SamplingParams], vocab: int) -> sampling.SamplingState:
    """The state of rows without prompts."""
    B = len(params)
    return sampling.init(params, vocab, np.zeros((B, 1), np.int32), np.zeros(B, np.int32))


def normal(*shape: int) -> np.ndarray:
    return (3 * np.random.default_rng(0).normal(size=shape)).astype(np.float32)


# Agreement with transformers


def hf_distribution(logits_V: np.ndarray, p: SamplingParams) -> np.ndarray:
    """What transformers' `generate` draws from: its processors in its order."""
    chain = [hf.TemperatureLogitsWarper(float(p.temperature))]
    chain += [hf.TopKLogitsWarper(p.top_k)] if p.top_k else []
    chain += [hf.TopPLogitsWarper(float(p.top_p))] if p.top_p < 1 else []
    chain += [hf.MinPLogitsWarper(float(p.min_p))] if p.min_p else []
    scores_1V: Any = torch.tensor(logits_V)[None]
    no_ids: Any = torch.zeros((1, 0), dtype=torch.long)
    for processor in chain:
        scores_1V = processor(no_ids, scores_1V)
    return torch.softmax(scores_1V, -1)[0].numpy()


@pytest.mark.parametrize("step", [0.0, 0.5, 100.0], ids=["distinct", "many ties", "all equal"])
@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=1),
        SamplingParams(top_k=17),
        SamplingParams(top_k=1000),
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.95),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=0.05),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=1.7, top_k=40, top_p=0.8, min_p=0.1),
        SamplingParams(temperature=0.3, top_k=100, top_p=0.99, min_p=0.01),
    ],
    ids=lambda p: " ".join(
        f"{name}={value}"
        for name, value in dataclasses.asdict(p).items()
        if value != getattr(SamplingParams(), name)
    ),
)
def test_filtered_distribution_matches_transformers(p, step):
    logits_BV = normal(4, 300)
    logits_BV = np.round(logits_BV / step).astype(np.float32) * step if step else logits_BV
    logits_BV = logits_BV.astype(np.float32)
    ours_BV = jax.nn.softmax(filtered(jnp.asarray(logits_BV), start([p] * 4, 300)), axis=-1)
    for ours_V, logits_V in zip(np.asarray(ours_BV), logits_BV, strict=True):
        theirs_V = hf_distribution(logits_V, p)
        if step:
            # torch.sort is not stable: which of equal tokens top-p cuts is arbitrary there.
            ours_V, theirs_V = np.sort(ours_V), np.sort(theirs_V)
        np.testing.assert_array_equal(ours_V > 0, theirs_V > 0)
        # Two float32 softmaxes of 300 terms: a few units in the last place.
        np.testing.assert_allclose(ours_V, theirs_V, rtol=3e-6)


def test_repetition_penalty_matches_transformers():
    logits_BV = normal(2, 50)
    prompts = np.array([[3, 3, 7, 49], [0, 1, 2, 3]])
    params = [SamplingParams(repetition_penalty=1.4)] * 2
    state = sampling.init(params, 50, prompts, np.array([4, 4]))
    ours_BV = sampling.penalised_logits(jnp.asarray(logits_BV), state)
    ids: Any = torch.tensor(prompts)
    theirs_BV: Any = hf.RepetitionPenaltyLogitsProcessor(1.4)(ids, torch.tensor(logits_BV))
    # One multiplication or division, which XLA may turn into a product with the reciprocal.
    np.testing.assert_allclose(ours_BV, theirs_BV.numpy(), rtol=2e-7)


# Filters against their definitions


@settings(deadline=None, max_examples=150)
@given(
    counts=st.lists(st.integers(0, 9), min_size=8, max_size=8).filter(any),
    top_k=st.integers(0, 10),
    position=st.floats(0, 1) | st.none(),
)
def test_top_k_and_top_p_follow_their_definitions(counts, top_k, position):
    """Weights are integers and the cut is between two of their sums, so rounding cannot matter.

    Of tokens tied at the edge of top-p the lower ids stay; ties at the edge of top-k all stay.
    """
    counts_V = np.array(counts)
    kth = np.sort(counts_V)[-min(top_k, 8)] if top_k else 0
    left_V = np.where(counts_V >= max(kth, 1), counts_V, 0)
    cut = 0 if position is None else int(position * (left_V.sum() - 1)) + 0.5
    order_V = np.lexsort((-np.arange(8), left_V))
    expected_V = np.zeros(8, bool)
    expected_V[order_V] = np.cumsum(left_V[order_V]) > cut

    p = SamplingParams(top_k=top_k, top_p=1 - cut / float(left_V.sum()))
    with np.errstate(divide="ignore"):
        logits_V = np.log(counts_V.astype(np.float32))
    kept_V = np.isfinite(np.asarray(filtered(jnp.asarray(logits_V)[None], start([p], 8)))[0])
    np.testing.assert_array_equal(kept_V, expected_V)


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=12, max_size=12),
    top_k=st.integers(0, 13),
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
    more=st.floats(0, 1),
)
def test_the_best_token_stays_and_looser_filters_keep_more(logits, top_k, top_p, min_p, more):
    looser_p = min(1.0, top_p + more)
    params = [
        SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p),
        SamplingParams(top_k=top_k, top_p=top_p),
        SamplingParams(top_k=top_k, top_p=looser_p),
        SamplingParams(top_p=top_p),
        SamplingParams(min_p=min_p),
        SamplingParams(min_p=min_p * more),
        SamplingParams(),
    ]
    logits_V = np.array(logits, np.float32) / 4
    x_BV = jnp.asarray(np.tile(logits_V, (len(params), 1)))
    out_BV = np.asarray(filtered(x_BV, start(params, 12)))
    both, no_min, p_looser, p_only, min_only, min_looser, off = np.isfinite(out_BV)
    assert off.all()
    assert (both <= no_min).all()
    assert (no_min <= p_looser).all()
    assert (no_min <= p_only).all()
    assert (both <= min_only).all()
    assert (min_only <= min_looser).all()
    assert np.isfinite(out_BV).any(axis=1).all()
    kept = np.isfinite(out_BV)
    assert (np.where(kept, logits_V, -np.inf).max(axis=1) == logits_V.max()).all()
    np.testing.assert_array_equal(out_BV[kept], np.asarray(x_BV)[kept])


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_top_p_is_exact_over_a_full_vocabulary(top_p):
    logits_V = normal(129280)
    kept_V = np.isfinite(
        np.asarray(
            filtered(jnp.asarray(logits_V)[None], start([SamplingParams(top_p=top_p)], 129280))
        )
    )[0]
    p_V = np.exp(logits_V.astype(np.float64))
    p_V /= p_V.sum()
    # The relative error of sums of 129280 float32 terms was 1e-7.
    assert p_V[kept_V].sum() >= top_p - 1e-6
    assert p_V[kept_V].sum() - p_V[kept_V].min() <= top_p + 1e-6
    assert logits_V[kept_V].min() >= logits_V[~kept_V].max()


def test_top_p_is_relative_to_what_top_k_left():
    logits_1V = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    p = SamplingParams(top_k=2, top_p=0.5)
    # 0.4 is more than half of the remaining 0.7, but not of 1.
    assert np.isfinite(filtered(logits_1V, start([p], 4))).tolist() == [[True, False, False, False]]
