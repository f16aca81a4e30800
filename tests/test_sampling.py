"""Draws, penalties, log-probabilities and validation; the filters have a file of their own.

Axis letters: B batch, T prompt tokens, V vocabulary, N alternatives, S steps.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tests import models
from v4jax.decoding import sampling
from v4jax.decoding.sampling import SamplingParams

sample = jax.jit(sampling.sample, static_argnames="top_logprobs")
filtered = jax.jit(sampling.filtered_logits)
penalised = jax.jit(sampling.penalised_logits)

MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=1, temperature=0.7, top_p=0.8),
    SamplingParams(seed=2, top_k=5, repetition_penalty=1.3),
    SamplingParams(seed=3, min_p=0.1, frequency_penalty=0.5, presence_penalty=-0.5),
    SamplingParams(seed=4, temperature=1.5, top_k=20, top_p=0.9, min_p=0.02),
]


def start(
    params: Sequence[SamplingParams], vocab: int, prompts: Sequence[Sequence[int]] | None = None
) -> sampling.SamplingState:
    """The state after these prompts, empty by default."""
    prompts = prompts or [[]] * len(params)
    lengths_B = np.array([len(prompt) for prompt in prompts])
    tokens_BT = np.zeros((len(params), int(lengths_B.max()) + 2), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    return sampling.init(params, vocab, tokens_BT, lengths_B)


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def take_rows(tree, rows):
    return jax.tree.map(lambda leaf: leaf[np.array(rows)], tree)


def draws(logits_SBV: np.ndarray, state: sampling.SamplingState) -> np.ndarray:
    """Tokens [S, B] drawn at each step."""
    tokens = []
    for logits_BV in logits_SBV:
        token_B, _, _, state = sample(jnp.asarray(logits_BV), state)
        tokens.append(np.asarray(token_B))
    return np.stack(tokens)


def softmax(x_V: np.ndarray) -> np.ndarray:
    mass_V = np.exp(x_V.astype(np.float64) - x_V.max())
    return mass_V / mass_V.sum()


# Draws


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(seed=11),
        SamplingParams(seed=12, temperature=0.5),
        SamplingParams(seed=13, top_k=4),
        SamplingParams(seed=14, top_p=0.8),
    ],
)
def test_draws_follow_the_distribution(p):
    """Chi-square over 4,000 draws of one request, and over one draw of each of 4,000 requests."""
    logits_V = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5], np.float32)
    single = start([p], 7)
    logits_1V = jnp.asarray(logits_V)[None]

    def step(state, _):
        token_1, _, _, state = sampling.sample(logits_1V, state)
        return state, token_1[0]

    over_steps = jax.jit(lambda state: jax.lax.scan(step, state, length=4000)[1])(single)
    many = start([dataclasses.replace(p, seed=100 + i) for i in range(4000)], 7)
    over_rows = sample(jnp.asarray(np.tile(logits_V, (4000, 1))), many)[0]
    probability_V = softmax(np.asarray(filtered(logits_1V, single))[0])
    possible = probability_V > 0
    for tokens in (over_steps, over_rows):
        count_V = np.bincount(np.asarray(tokens), minlength=7)
        assert count_V[~possible].sum() == 0
        expected_V = 4000 * probability_V[possible]
        chi2 = ((count_V[possible] - expected_V) ** 2 / expected_V).sum()
        # The 0.9999 quantile for 6 degrees of freedom, the most that occur.
        assert chi2 < 27.9


def test_noise_is_standard_gumbel_without_ties_among_the_largest():
    x_V = np.asarray(sampling._gumbel(jnp.array([[0, 5]], jnp.uint32), jnp.array([2]), 129280))[0]
    assert np.isfinite(x_V).all()
    # Standard errors over 129280 values: 0.0036 for the mean, 0.0096 for the variance.
    assert abs(x_V.mean() - 0.57722) < 0.015
    assert abs(x_V.var() - math.pi**2 / 6) < 0.04
    assert len(np.unique(np.sort(x_V)[-300:])) == 300


def test_a_row_draws_the_same_tokens_alone_and_in_any_batch():
    vocab, steps = 64, 6
    logits_SBV = normal(steps, len(MIXED), vocab)
    prompts = [[i, 2 * i, 5] for i in range(len(MIXED))]
    batch_SB = draws(logits_SBV, start(MIXED, vocab, prompts))
    for i, p in enumerate(MIXED):
        alone_S1 = draws(logits_SBV[:, i : i + 1], start([p], vocab, [prompts[i]]))
        assert alone_S1[:, 0].tolist() == batch_SB[:, i].tolist()
    order = [4, 0, 5, 2, 1, 3]
    permuted_SB = draws(logits_SBV[:, order], take_rows(start(MIXED, vocab, prompts), order))
    np.testing.assert_array_equal(permuted_SB, batch_SB[:, order])


def test_equal_seeds_repeat_tokens_and_missing_seeds_do_not():
    logits_SBV = np.zeros((8, 1, 1000), np.float32)
    run = lambda seed: draws(logits_SBV, start([SamplingParams(seed=seed)], 1000)).tolist()
    assert run(7) == run(7)
    # 32-bit truncation would make these pairs equal.
    others = [run(seed) for seed in (7, 7 + 2**32, -7, 2**64 - 1, None, None)]
    assert len({str(tokens) for tokens in others}) == len(others)


def test_a_request_can_continue_in_another_batch():
    """Rows of the state can move between batches: they do not record their position."""
    vocab = 64
    logits_SBV = normal(6, len(MIXED), vocab)
    expected_SB = draws(logits_SBV, start(MIXED, vocab))
    state = start(MIXED, vocab)
    for logits_BV in logits_SBV[:3]:
        *_, state = sample(jnp.asarray(logits_BV), state)
    later_SB = draws(logits_SBV[3:, [3, 1]], take_rows(state, [3, 1]))
    np.testing.assert_array_equal(later_SB, expected_SB[3:, [3, 1]])


@pytest.mark.parametrize("p", MIXED, ids=range(len(MIXED)))
def test_top_k_of_one_makes_every_draw_greedy(p):
    logits_SBV = normal(5, 1, 64)
    greedy = dataclasses.replace(
        p, top_k=1, repetition_penalty=1, presence_penalty=0, frequency_penalty=0
    )
    np.testing.assert_array_equal(draws(logits_SBV, start([greedy], 64)), logits_SBV.argmax(-1))


# Greedy


def test_greedy_picks_the_lowest_id_among_the_largest_logits():
    logits_BV = np.round(normal(16, 40))
    token_B, *_ = sample(jnp.asarray(logits_BV), start([SamplingParams(temperature=0)] * 16, 40))
    np.testing.assert_array_equal(token_B, logits_BV.argmax(-1))


def test_greedy_uses_penalised_logits_and_ignores_filters():
    logits_1V = jnp.array([[1.0, 3.0, 2.5]])
    p = SamplingParams(temperature=0, presence_penalty=1, top_k=1, top_p=0.1, min_p=1)
    assert draws(np.tile(logits_1V, (3, 1, 1)), start([p], 3))[:, 0].tolist() == [1, 2, 1]


# Penalties


def test_penalties_match_a_plain_loop():
    params = [
        SamplingParams(repetition_penalty=1.5, seed=1),
        SamplingParams(presence_penalty=1.25, seed=2),
        SamplingParams(frequency_penalty=-0.75, seed=3),
        SamplingParams(
            repetition_penalty=0.8, presence_penalty=-1, frequency_penalty=2, temperature=0
        ),
        SamplingParams(seed=4),
    ]
    vocab = 6
    prompts = [[0, 0, 1], [1, 2], [3], [4, 5, 5, 0], []]
    state = start(params, vocab, prompts)
    outputs: list[list[int]] = [[] for _ in params]
    for logits_BV in normal(12, len(params), vocab, scale=1.0):
        ours_BV = np.asarray(penalised(jnp.asarray(logits_BV), state))
        for row, p in enumerate(params):
            for v in range(vocab):
                x = float(logits_BV[row, v])
                if v in prompts[row] or v in outputs[row]:
                    x = x * p.repetition_penalty if x < 0 else x / p.repetition_penalty
                times = outputs[row].count(v)
                x -= p.frequency_penalty * times + p.presence_penalty * (times > 0)
                # Three float32 roundings of numbers up to 30.
                assert ours_BV[row, v] == pytest.approx(x, rel=1e-6, abs=1e-5)
        np.testing.assert_array_equal(ours_BV[-1], logits_BV[-1])
        token_B, _, _, state = sample(jnp.asarray(logits_BV), state)
        for output, token in zip(outputs, np.asarray(token_B).tolist(), strict=True):
            output.append(token)


def test_tokens_beyond_a_prompts_length_are_not_counted():
    tokens_BT = np.array([[1, 2, 3, 4]])
    state = sampling.init([SamplingParams()], 6, tokens_BT, np.array([2]))
    assert np.flatnonzero(state.in_prompt_BV[0]).tolist() == [1, 2]


# Logprobs


def test_logprobs_come_from_the_raw_logits():
    logits_BV = normal(len(MIXED), 30)
    token_B, logprob_B, (ids_BN, top_BN), _ = sample(
        jnp.asarray(logits_BV), start(MIXED, 30, [[1, 2]] * len(MIXED)), top_logprobs=30
    )
    expected_BV = np.log(np.stack([softmax(row_V) for row_V in logits_BV]))
    rows_B = np.arange(len(MIXED))
    # float32 log-sum-exp of values up to 10.
    np.testing.assert_allclose(logprob_B, expected_BV[rows_B, np.asarray(token_B)], atol=3e-6)
    np.testing.assert_allclose(
        top_BN, np.take_along_axis(expected_BV, np.asarray(ids_BN), axis=1), atol=3e-6
    )
    np.testing.assert_array_equal(ids_BN, np.argsort(-logits_BV, axis=1, kind="stable"))
    # Over all tokens the probabilities sum to 1, within 30 float32 roundings.
    np.testing.assert_allclose(np.exp(top_BN).sum(axis=1), 1, rtol=3e-6)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_requested_number_of_alternatives_is_returned(n):
    _, _, (ids_BN, top_BN), _ = sample(jnp.zeros((2, 5)), start(MIXED[:2], 5), top_logprobs=n)
    assert ids_BN.shape == top_BN.shape == (2, n)
    assert ids_BN.tolist() == [list(range(n))] * 2


@pytest.mark.parametrize("n", [-1, 6])
def test_alternatives_beyond_the_vocabulary_are_rejected(n):
    with pytest.raises(ValueError, match=f"top_logprobs is {n}; it must be 0 to 5"):
        sampling.sample(jnp.zeros((1, 5)), start(MIXED[:1], 5), top_logprobs=n)


# Extreme logits and settings


@pytest.mark.parametrize("p", MIXED, ids=range(len(MIXED)))
def test_forbidden_tokens_are_never_drawn(p):
    logits_SBV = np.full((20, 1, 16), -np.inf, np.float32)
    logits_SBV[:, 0, [3, 9]] = [-50, -51]
    assert set(draws(logits_SBV, start([p], 16))[:, 0].tolist()) <= {3, 9}


@pytest.mark.parametrize("p", MIXED, ids=range(len(MIXED)))
def test_the_only_allowed_token_is_drawn(p):
    logits_SBV = np.full((5, 1, 16), -np.inf, np.float32)
    logits_SBV[..., 9] = 0
    assert draws(logits_SBV, start([p], 16))[:, 0].tolist() == [9] * 5


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-45, 1e-300])
def test_a_tiny_temperature_is_greedy_without_nan(temperature):
    logits_BV = normal(4, 100, scale=30.0)
    params = [SamplingParams(temperature=temperature, top_p=0.9, min_p=0.1, seed=1)] * 4
    token_B, logprob_B, _, _ = sample(jnp.asarray(logits_BV), start(params, 100))
    np.testing.assert_array_equal(token_B, logits_BV.argmax(-1))
    assert np.isfinite(logprob_B).all()


def test_a_huge_temperature_draws_uniformly():
    params = [SamplingParams(temperature=1e30, seed=seed) for seed in range(600)]
    token_B, *_ = sample(jnp.asarray(normal(600, 3)), start(params, 3))
    # 200 of each, standard deviation 11.5.
    assert np.abs(np.bincount(np.asarray(token_B), minlength=3) - 200).max() < 50


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_invalid_row_reports_nan_and_leaves_the_others_alone(bad):
    logits_BV = normal(len(MIXED), 20)
    expected_B, *_ = sample(jnp.asarray(logits_BV), start(MIXED, 20))
    for row in range(len(MIXED)):
        broken_BV = logits_BV.copy()
        broken_BV[row, slice(None) if bad == -np.inf else 4] = bad
        token_B, logprob_B, _, _ = sample(jnp.asarray(broken_BV), start(MIXED, 20))
        assert 0 <= int(token_B[row]) < 20
        np.testing.assert_array_equal(np.isnan(logprob_B), np.arange(len(MIXED)) == row)
        others = np.arange(len(MIXED)) != row
        np.testing.assert_array_equal(token_B[others], expected_B[others])


# Compilation


def test_parameter_values_do_not_recompile():
    def once(logits_BV, state):
        return sampling.sample(logits_BV, state)

    fn = jax.jit(once)
    with models.programs() as compiled:
        for i in range(3):
            params = [MIXED[(i + j) % len(MIXED)] for j in range(4)]
            state = start(params, 32, [[j] * (i + 1) for j in range(4)])
            for logits_BV in normal(3, 4, 32, seed=i):
                *_, state = fn(jnp.asarray(logits_BV), state)
    assert compiled.count("jit(once)") == 1


# Validation


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.1, "a finite number of 0 or more"),
        ("temperature", math.inf, "a finite number of 0 or more"),
        ("temperature", 1e39, "a finite number of 0 or more"),
        ("top_k", -1, "an integer of 0 or more"),
        ("top_k", 1.5, "an integer of 0 or more"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("min_p", 1.1, "from 0 to 1"),
        ("repetition_penalty", 0.0, "a finite number above 0"),
        ("repetition_penalty", math.inf, "a finite number above 0"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("frequency_penalty", -2.1, "from -2 to 2"),
        ("seed", 2**64, "None or an integer"),
        ("seed", 0.5, "None or an integer"),
        ("temperature", "1", "a finite number"),
        ("top_p", None, "a number"),
    ],
)
def test_values_out_of_range_are_rejected(name, value, message, monkeypatch):
    # Annotations are only checked in tests, so the class itself must reject other types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=rf"^{name} is .*; it must be .*{message}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SamplingParams)])
@pytest.mark.parametrize("value", [math.nan, True], ids=["nan", "bool"])
def test_nan_and_bool_are_rejected(name, value, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("params", "tokens", "lengths", "message"),
    [
        (2, [[1]], [1], "got 2 and 1"),
        (1, [[1]], [2], "Prompt 0 has length 2; it must be 0 to 1"),
        (1, [[5]], [1], "Prompt 0 has token 5; the vocabulary is 5"),
        (1, [[-1]], [1], "Prompt 0 has token -1"),
    ],
)
def test_prompts_that_do_not_fit_are_rejected(params, tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        sampling.init([SamplingParams()] * params, 5, np.array(tokens), np.array(lengths))
