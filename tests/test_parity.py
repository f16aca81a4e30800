"""Logits and greedy text against transformers, from checkpoints that transformers wrote."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import v4jax
from tests import hf_models

# (ratios, changes, batch, length). The tolerance is 1e-5 of the largest logit: transformers' own
# chunked and unchunked prefill differ by up to 1e-6, and ours may differ by rounding only.
CASES: dict[str, tuple[list[int] | None, dict[str, Any], int, int]] = {
    "one token": ([0, 4, 128], {}, 3, 1),
    "shorter than a window": ([0, 0, 4, 128, 4], {}, 2, 7),
    "one past a window": ([0, 0, 4, 128, 4], {}, 1, 17),
    "flash": ([0, 0, 4, 128, 4, 128, 4], {}, 2, 150),
    "flash long": ([0, 0, 4, 128, 4, 128, 4], {}, 1, 1100),
    "pro": ([128, 128, 4, 128, 4, 128, 4], {"index_topk": 16}, 1, 300),
    "sliding only": ([0, 0, 0], {"num_hash_layers": 0}, 2, 100),
    "csa only": ([4, 4, 4], {}, 2, 131),
    "hca only": ([128, 128], {"num_hash_layers": 1}, 1, 400),
    "topk above entries": ([4, 4], {"index_topk": 1000}, 1, 90),
    "topk of one": ([4, 0, 4], {"index_topk": 1}, 1, 65),
    "all hash": ([0, 4], {"num_hash_layers": 2, "num_experts_per_tok": 4}, 1, 40),
    "other rates": (
        None,
        {
            "num_hidden_layers": 4,
            "layer_types": [
                "compressed_sparse_attention",
                "heavily_compressed_attention",
                "sliding_attention",
                "compressed_sparse_attention",
            ],
            "compress_rates": {
                "compressed_sparse_attention": 8,
                "heavily_compressed_attention": 24,
            },
        },
        2,
        127,
    ),
    "no yarn": ([0, 4, 128], {"rope_scaling": None}, 1, 140),
    "two streams": ([4, 128], {"hc_mult": 2, "hc_sinkhorn_iters": 3}, 1, 130),
    "tight clamp": ([0, 4], {"swiglu_limit": 0.02, "routed_scaling_factor": 2.5}, 2, 33),
    "wide rope": ([4, 128], {"qk_rope_head_dim": 32, "head_dim": 64, "o_groups": 4}, 1, 129),
    "real window": ([0, 4, 128], {"sliding_window": 128}, 1, 515),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, directory: Path) -> None:
    assert_logits_equal_transformers(name, directory)


def assert_logits_equal_transformers(name: str, directory: Path) -> None:
    """Check one of `CASES`."""
    ratios, changes, batch, length = CASES[name]
    theirs = hf_models.make(ratios, len(name), **changes)
    path = hf_models.save(theirs, directory / name.replace(" ", "_"))
    ours = v4jax.load(path, dtype="float32", numerics="hf")
    tokens_BT = np.random.default_rng(length).integers(0, 128, (batch, length))
    expected_BTV = hf_models.logits(theirs, tokens_BT)
    difference = np.abs(ours.logits(tokens_BT) - expected_BTV).max()
    assert difference <= 1e-5 * np.abs(expected_BTV).max()


def test_200_greedy_tokens_equal_transformers(directory: Path) -> None:
    theirs = hf_models.make([0, 0, 4, 128, 4], 5, eos_token_id=None)
    path = hf_models.save(theirs, directory / "greedy")
    ours = v4jax.load(path, dtype="float32", numerics="hf")
    assert ours.config == dataclasses.replace(ours.config, eos_token_ids=())
    prompt = list(range(3, 60))
    out = ours.generate(prompt, max_tokens=200, temperature=0.0)
    assert out.tokens == hf_models.greedy(theirs, prompt, 200)
    assert out.finish_reason == "length"
