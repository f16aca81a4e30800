"""The oracle is right: its model against transformers, roundings and MTP against definitions.

Where transformers casts to float32 by name, the name is patched to mean float64, so that neither
side rounds and no choice of experts or entries can flip.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

from tests import oracle
from tests.oracle import attention, formats, model, primitives
from tests.oracle.transformers_twin import hf_model

EXACT = 1e-11  # for logits of order 1; measured float64 noise through six layers is 2e-14

CONFIGS = {
    "flash": {},
    "pro": {
        "compress_ratios": [128, 128, 4, 128, 4, 0],
        "num_hash_layers": 3,
        "head_dim": 96,
        "qk_rope_head_dim": 24,
        "index_head_dim": 64,
        "index_topk": 3,
        "num_experts_per_tok": 3,
        "sliding_window": 16,
        "swiglu_limit": 0.5,
        "routed_scaling_factor": 2.5,
    },
    "other_ratios": {
        "compress_ratios": [6, 0, 16, 6, 0],
        "layer_kinds": ["csa", "sliding", "hca", "csa"],
        "num_hash_layers": 1,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "hc_eps": 1e-3,
        "rms_norm_eps": 1e-2,
        "index_topk": 500,
        "o_groups": 4,
        "rope_scaling": oracle.tiny_config()["rope_scaling"]
        | {"factor": 4, "original_max_position_embeddings": 128},
    },
}


@pytest.fixture
def float64_torch(monkeypatch):
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def random_tokens(config, n_tokens, seed=1, batch=2):
    rng = np.random.default_rng(seed)
    return rng.integers(0, config["vocab_size"], (batch, n_tokens))


def hf_logits(hf, **inputs):
    with torch.no_grad():
        return hf(**inputs, use_cache=False).logits.numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_hf_numerics_equal_transformers_in_float64(name, float64_torch):
    config = oracle.tiny_config(**CONFIGS[name])
    weights = oracle.random_weights(config, seed=3)
    if name == "other_ratios":  # transformers counts an expert as often as a row lists it
        weights["layers.0.ffn.gate.tid2eid"][::2, 1] = weights["layers.0.ffn.gate.tid2eid"][::2, 0]
    hf = hf_model(weights, config, torch.float64)
    for n_tokens in (1, 7, 130, 300):
        tokens = random_tokens(config, n_tokens)
        ours = oracle.forward(weights, config, tokens, numerics="hf").logits
        theirs = hf_logits(hf, input_ids=torch.from_numpy(tokens))
        assert theirs.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, atol=EXACT, rtol=0, err_msg=f"T={n_tokens}")


def test_hf_numerics_equal_unpatched_transformers_in_float32():
    config = oracle.tiny_config()
    weights = oracle.random_weights(config, seed=3)
    tokens = random_tokens(config, 40)
    ours = oracle.forward(weights, config, tokens, numerics="hf", dtype=np.float32).logits
    theirs = hf_logits(hf_model(weights, config, torch.float32), input_ids=torch.from_numpy(tokens))
    assert ours.dtype == theirs.dtype == np.float32
    # sums of up to 256 float32 products, through six layers
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_mtp_block_and_head_equal_a_one_layer_transformers_model(float64_torch):
    config = oracle.tiny_config()
    weights = oracle.random_weights(config, seed=5)
    n, d = config["hc_mult"], config["hidden_size"]
    alone = oracle.tiny_config(compress_ratios=[0, 0], num_hash_layers=0)
    renamed = {}
    for name in weights:
        if name.startswith("mtp.0."):
            short = name.removeprefix("mtp.0.")
            top = short.startswith(("hc_head", "norm."))
            if not short.startswith(("e_proj", "h_proj", "enorm", "hnorm")):
                renamed[short if top else f"layers.0.{short}"] = weights[name]
    shared = {k: weights[k] for k in ("embed.weight", "head.weight")}
    hf = hf_model(renamed | shared, alone, torch.float64)

    tokens = random_tokens(config, 30)
    hidden = np.random.default_rng(0).standard_normal((2, 30, d))
    p = {
        k.removeprefix("mtp.0."): w.astype(np.float64)
        for k, w in weights.items()
        if k.startswith("mtp.0.")
    }

    def norm(x, w):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config["rms_norm_eps"]) * w

    embedded = norm(weights["embed.weight"].astype(np.float64)[tokens], p["enorm.weight"])
    joined = np.concatenate([embedded, norm(hidden, p["hnorm.weight"])], axis=-1)
    joined = joined @ np.concatenate([p["e_proj.weight"], p["h_proj.weight"]], axis=1).T
    theirs = hf_logits(hf, inputs_embeds=torch.from_numpy(joined))

    streams = np.repeat(hidden[:, :, None], n, axis=2)
    ours = oracle.mtp_forward(weights, config, streams, tokens, numerics="hf").logits
    np.testing.assert_allclose(ours, theirs, atol=EXACT, rtol=0)


SMALL = oracle.tiny_config(
    compress_ratios=[0, 4, 16, 4, 0], layer_kinds=["sliding", "csa", "hca", "csa"], index_topk=3
)
SMALL_WEIGHTS = oracle.random_weights(SMALL, seed=0)
SMALL_TOKENS = random_tokens(SMALL, 50)


def run(tokens, weights=SMALL_WEIGHTS, *, numerics="official", **switches):
    return oracle.forward(weights, SMALL, tokens, numerics=numerics, **switches)


def run_mtp(streams, next_tokens, weights=SMALL_WEIGHTS, numerics="official", **switches):
    return oracle.mtp_forward(weights, SMALL, streams, next_tokens, numerics=numerics, **switches)


MODES = [
    {"numerics": "hf"},
    {"numerics": "official"},
    {"numerics": "official", "linear_quant": True},
]


@pytest.mark.parametrize("mode", MODES)
def test_a_prefix_equals_the_start_of_the_full_sequence(mode):
    full = run(SMALL_TOKENS, **mode)
    next_tokens = np.roll(SMALL_TOKENS, -1, axis=1)
    full_mtp = run_mtp(full.streams, next_tokens, **mode)
    for n in (1, 3, 4, 17, 49):
        part = run(SMALL_TOKENS[:, :n], **mode)
        part_mtp = run_mtp(part.streams, next_tokens[:, :n], **mode)
        for ours, expected in ((part, full), (part_mtp, full_mtp)):
            np.testing.assert_allclose(ours.logits, expected.logits[:, :n], atol=EXACT)
            np.testing.assert_allclose(ours.streams, expected.streams[:, :n], atol=EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_batch_are_independent(mode):
    both = run(SMALL_TOKENS, **mode).logits
    np.testing.assert_allclose(run(SMALL_TOKENS[1:], **mode).logits, both[1:], atol=EXACT)


def test_without_its_roundings_official_equals_hf(monkeypatch):
    monkeypatch.setattr(formats, "fake_quant_fp8", lambda x, *_: x)
    monkeypatch.setattr(formats, "fake_quant_fp4", lambda x, *_: x)
    ours, hf = run(SMALL_TOKENS), run(SMALL_TOKENS, numerics="hf")
    np.testing.assert_allclose(ours.logits, hf.logits, atol=EXACT)


@pytest.mark.parametrize("rounding", ["fake_quant_fp8", "fake_quant_fp4"])
def test_each_rounding_changes_logits(monkeypatch, rounding):
    official = run(SMALL_TOKENS).logits
    monkeypatch.setattr(formats, rounding, lambda x, *_: x)
    assert np.abs(run(SMALL_TOKENS).logits - official).max() > 1e-3


def test_linear_quant_changes_logits_a_little():
    exact, rounded = run(SMALL_TOKENS[:, :3]), run(SMALL_TOKENS[:, :3], linear_quant=True)
    difference = np.abs(exact.logits - rounded.logits).max()
    assert 1e-3 < difference < 1


def test_kv_is_rounded_outside_the_rope_dims_only():
    config = oracle.tiny_config(head_dim=96, qk_rope_head_dim=16)
    s = primitives.make_settings(config, "official", np.float64, False)
    kv = np.random.default_rng(0).standard_normal((1, 5, 96))
    rounded = attention._rounded_kv(kv, s)
    np.testing.assert_array_equal(rounded[..., 80:], kv[..., 80:])
    np.testing.assert_array_equal(rounded[..., :64], formats.fake_quant_fp8(kv[..., :64], 64))
    np.testing.assert_array_equal(rounded[..., 64:80], formats.fake_quant_fp8(kv[..., 64:80], 16))
    assert (rounded != kv)[..., :80].mean() > 0.9


def test_indexer_scores_fp4_rounded_queries_and_keys_rotated_by_hadamard():
    s = primitives.make_settings(SMALL, "official", np.float64, False)
    p = primitives.scope(SMALL_WEIGHTS, "layers.1.attn.indexer.", s)
    rng = np.random.default_rng(0)
    x, qr = rng.standard_normal((1, 12, 64)), rng.standard_normal((1, 12, 32))

    def rotated_and_rounded(v):
        v = formats.hadamard(v)
        scale = 2 ** np.ceil(np.log2(np.abs(v).max(-1, keepdims=True) / 6))
        return (v / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale

    q = (qr @ p["wq_b.weight"].T).reshape(12, 16, 32)
    angle = np.arange(12)[:, None] * primitives.rope_frequencies(s, True)
    turned = (q[..., 16::2] + 1j * q[..., 17::2]) * np.exp(1j * angle)[:, None]
    q[..., 16::2], q[..., 17::2] = turned.real, turned.imag
    k = attention.compress(primitives.scope(p, "compressor.", s), x, 4, s, overlap=True)[0]
    dots = rotated_and_rounded(q) @ rotated_and_rounded(k).T
    expected = np.sum(np.maximum(dots, 0) * (x[0] @ p["weights_proj.weight"].T)[..., None], 1)
    ours = attention.index_scores(p, x, qr, 4, s)[0]
    np.testing.assert_allclose(ours, expected / 512**0.5, atol=EXACT)


def test_float32_agrees_with_float64_where_nothing_is_rounded():
    single, double = (
        run(SMALL_TOKENS, numerics="hf", dtype=dtype) for dtype in (np.float32, np.float64)
    )
    assert single.logits.dtype == single.streams.dtype == np.float32
    np.testing.assert_allclose(single.logits, double.logits, atol=1e-4)


def test_every_tensor_of_the_backbone_affects_its_logits():
    tokens = SMALL_TOKENS[:1, :40]
    before = run(tokens, numerics="hf").logits
    fresh = oracle.random_weights(SMALL, seed=9)
    for name in fresh:
        if ".experts." in name and ".experts.0." not in name:
            continue
        after = run(tokens, SMALL_WEIGHTS | {name: fresh[name]}, numerics="hf").logits
        assert np.any(after != before) != name.startswith("mtp."), name


def test_mtp_reads_its_own_tensors_and_the_shared_embedding_and_head():
    streams = run(SMALL_TOKENS).streams
    before = run_mtp(streams, SMALL_TOKENS).logits
    fresh = oracle.random_weights(SMALL, seed=9)
    for name in fresh:
        after = run_mtp(streams, SMALL_TOKENS, SMALL_WEIGHTS | {name: fresh[name]}).logits
        read = name.startswith("mtp.0.") or name in ("embed.weight", "head.weight")
        assert np.any(after != before) == read, name


def test_mtp_uses_next_tokens_through_e_proj_only():
    streams = run(SMALL_TOKENS).streams
    other = random_tokens(SMALL, 50, seed=2)
    without_e_proj = SMALL_WEIGHTS | {"mtp.0.e_proj.weight": np.zeros((64, 64), np.float32)}
    a, b = (run_mtp(streams, tokens, without_e_proj).logits for tokens in (SMALL_TOKENS, other))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_mtp_sees_its_window_and_only_relative_positions(mode):
    window, drop = SMALL["sliding_window"], 13
    streams = run(SMALL_TOKENS).streams
    full = run_mtp(streams, SMALL_TOKENS, **mode).streams[:, drop:]
    late = run_mtp(streams[:, drop:], SMALL_TOKENS[:, drop:], **mode).streams
    np.testing.assert_allclose(late[:, window - 1 :], full[:, window - 1 :], atol=EXACT)
    for t in range(window - 1):  # a query short of its full window misses what was dropped
        assert np.abs(late[:, t] - full[:, t]).max() > 1e-3


def test_an_expert_repeated_by_tid2eid_counts_once_officially_and_twice_in_transformers():
    p = {"gate.weight": np.ones((4, 2)), "gate.tid2eid": np.array([[2, 2], [0, 3]])}
    weight = {
        numerics: model.route(
            p,
            np.ones((2, 2)),
            np.array([0, 1]),
            primitives.make_settings(SMALL, numerics, np.float64, False),
        )
        for numerics in ("official", "hf")
    }
    np.testing.assert_allclose(weight["official"], [[0, 0, 0.75, 0], [0.75, 0, 0, 0.75]])
    np.testing.assert_allclose(weight["hf"], [[0, 0, 1.5, 0], [0.75, 0, 0, 0.75]])


def test_random_routing_and_selection_are_not_degenerate(monkeypatch):
    chosen, scores = [], []
    true_route, true_best = model.route, attention.best_entries

    def spy_route(*args):
        chosen.append(true_route(*args) > 0)
        return chosen[-1]

    def spy_best(score_BTS, *args):
        scores.append(score_BTS)
        return true_best(score_BTS, *args)

    monkeypatch.setattr(model, "route", lambda *a: spy_route(*a).astype(np.float64))
    monkeypatch.setattr(attention, "best_entries", spy_best)
    run(random_tokens(SMALL, 200))
    for use_XE in chosen:
        assert (use_XE.sum(axis=1) == SMALL["num_experts_per_tok"]).all()
        assert (use_XE.mean(axis=0) > 0.02).all()
        assert len(np.unique(use_XE, axis=0)) > 10
    for score_BTS in scores:
        best = score_BTS[:, -1].argsort(axis=-1)[:, -3:]
        assert best.min() < 30, "the newest entries are not simply the best"
        assert np.ptp(score_BTS[:, -1]) > 0.1


def test_unknown_numerics_and_rounding_without_official_are_refused():
    with pytest.raises(ValueError, match="must be 'hf' or 'official'"):
        run(SMALL_TOKENS, numerics="exact")
    with pytest.raises(ValueError, match="use 'official'"):
        run(SMALL_TOKENS, numerics="hf", linear_quant=True)
