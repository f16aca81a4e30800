"""Expert loads, the balance loss within a document, and the update of router biases."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from tests import models
from v4jax.model import context
from v4jax.model.moe import Routing
from v4jax.model.numerics import HF
from v4jax_train import balance

CFG = models.config(models.CSA, num_experts_per_tok=2, n_routed_experts=8)


def routing(document_BT: np.ndarray, seed: int = 0) -> tuple[Routing, Any]:
    rng = np.random.default_rng(seed)
    batch, length = document_BT.shape
    score_BTE = rng.random((batch, length, 8), np.float32) + 0.1
    expert_BTA = np.argsort(-score_BTE - rng.random(8), axis=-1)[..., :2].astype(np.int32)
    expert_BTA = np.where(document_BT[..., None] > 0, expert_BTA, -1)
    shared = context.make(
        CFG,
        HF,
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.full(batch, length, jnp.int32),
        jnp.float32,
        document_BT=jnp.asarray(document_BT, jnp.int32),
    )
    return Routing(jnp.asarray(score_BTE), jnp.asarray(expert_BTA)), shared


def documents(*lengths: int, length: int = 640) -> np.ndarray:
    row = np.zeros(length, np.int32)
    at = 0
    for number, tokens in enumerate(lengths, 1):
        row[at : at + tokens] = number
        at += -(-tokens // 128) * 128
    return row


def test_loads_count_the_choices_of_real_tokens() -> None:
    routed, _ = routing(np.stack([documents(70, 200), documents(300)]))
    load_E = balance.load(routed)
    expert_BTA = np.asarray(routed.expert_BTA)
    np.testing.assert_array_equal(load_E, np.bincount(expert_BTA[expert_BTA >= 0], minlength=8))
    assert load_E.sum() == 2 * 570


def test_balance_loss_is_summed_over_documents_as_if_each_were_alone() -> None:
    document_BT = np.stack([documents(70, 200, 128), documents(300, 5)])
    routed, shared = routing(document_BT)
    expected = 0.0
    for row, documents_T in enumerate(document_BT):
        for number in range(1, documents_T.max() + 1):
            mask_T = documents_T == number
            score_TE = np.asarray(routed.score_BTE)[row, mask_T]
            expert_TA = np.asarray(routed.expert_BTA)[row, mask_T]
            share_E = np.bincount(expert_TA.ravel(), minlength=8) * 8 / 2 / mask_T.sum()
            mean_E = (score_TE / score_TE.sum(axis=-1, keepdims=True)).mean(axis=0)
            expected += mask_T.sum() * (share_E @ mean_E)
    np.testing.assert_allclose(balance.loss(routed, shared), expected, rtol=1e-5)


def test_even_loads_cost_one_per_token() -> None:
    expert_BTA = np.stack([np.arange(128) % 8, (np.arange(128) + 1) % 8], axis=-1)[None]
    even = Routing(jnp.ones((1, 128, 8)), jnp.asarray(expert_BTA, jnp.int32))
    _, shared = routing(np.ones((1, 128), np.int32))
    np.testing.assert_allclose(balance.loss(even, shared), 128.0, rtol=1e-6)


def test_biases_move_against_the_load_by_a_fixed_step() -> None:
    load_LE = jnp.asarray([[4.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    bias_LE = balance.updated_biases(jnp.zeros((2, 4)), load_LE, 0.5)
    np.testing.assert_array_equal(bias_LE, [[-0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    assert balance.violation(load_LE) == 1.0


def test_loads_are_named_after_their_biases() -> None:
    routed = {"load_E": jnp.zeros((3, 8)), "balance_loss": jnp.float32(0)}
    hashed = {"load_E": jnp.zeros((3, 8))}
    loads = balance.biases([[hashed], [routed, routed]], [[routed]])
    assert set(loads) == {
        "stacks.1.blocks.0.router.bias_E",
        "stacks.1.blocks.1.router.bias_E",
        "mtp.0.stack.blocks.0.router.bias_E",
    }
