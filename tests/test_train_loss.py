"""The training forward and its losses, against decode steps and documents on their own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import models
from tests.models import CSA, HCA, SLIDING
from v4jax.model import transformer
from v4jax.model.numerics import HF
from v4jax_train import loss

CFG = models.config(SLIDING, CSA, HCA, num_nextn_predict_layers=1)
TOKENS = models.tokens(CFG, 2, 128)


def batch(document_BT: Any, seed: int = 0) -> dict[str, jax.Array]:
    trained = np.random.default_rng(seed).random(TOKENS.shape) < 0.7
    return {
        "tokens": jnp.asarray(TOKENS),
        "document": jnp.asarray(document_BT, jnp.int32),
        "trained": jnp.asarray(trained),
    }


def test_rows_without_a_cache_have_the_logits_of_decode_steps() -> None:
    @jax.jit
    def logits(model: Any) -> Any:
        streams_BTM, *_ = transformer.forward_rows(model, CFG, HF, jnp.asarray(TOKENS))
        return transformer.head(model, transformer.hidden(model, CFG, streams_BTM))

    expected = models.full_logits(CFG, TOKENS)
    actual = logits(models.weights(CFG))
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


# Two fill their blocks, so that the next document begins right after their last token.
LENGTHS = ((128, 200, 70), (256, 5, 130))
LONG = dataclasses.replace(CFG, max_position_embeddings=512)


def packed() -> tuple[dict[str, jax.Array], list[np.ndarray]]:
    """Two rows of 640 tokens with several documents each, and each document alone."""
    rng = np.random.default_rng(3)
    arrays = {name: np.zeros((2, 640), np.int32) for name in ("tokens", "document", "trained")}
    alone = []
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths, 1):
            text = rng.integers(0, LONG.vocab_size, length, np.int32)
            arrays["tokens"][row, at : at + length] = text
            arrays["document"][row, at : at + length] = number
            arrays["trained"][row, at + 1 : at + length] = rng.random(length - 1) < 0.7
            alone.append((text, arrays["trained"][row, at : at + length].copy()))
            at += -(-length // 128) * 128
    batch: dict[str, Any] = {name: jnp.asarray(array) for name, array in arrays.items()}
    return batch | {"trained": batch["trained"] == 1}, alone


def test_packed_documents_have_the_losses_and_gradients_of_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "_LOGITS", 1)  # in two parts; rows this short would be in one

    @jax.jit
    def total(model: Any, batch: Any) -> Any:
        losses, loads = loss.sums(model, LONG, HF, batch, mtp=True, agreement=True, indexer=True)
        weights = {"loss": 1.0, "mtp_loss": 0.3, "balance_loss": 0.1, "indexer_loss": 0.2}
        return sum(weight * losses[name] for name, weight in weights.items()), losses | loads

    differentiated = jax.jit(jax.value_and_grad(total, has_aux=True, allow_int=True))
    model, (batch, alone) = models.weights(LONG), packed()
    (_, actual), gradient = differentiated(model, batch)
    # One program for all: each document at the front of rows that are otherwise padding.
    expected, summed = dict.fromkeys(actual, 0.0), None
    for text, trained in alone:
        pad = lambda x: np.pad(x, (0, 640 - len(x)))[None].repeat(2, 0)
        single = {
            "tokens": jnp.asarray(pad(text)),
            "document": jnp.asarray(pad(np.ones_like(text)) * np.array([[1], [0]], np.int32)),
            "trained": jnp.asarray(pad(trained) == 1),
        }
        (_, values), part = differentiated(model, single)
        expected = {name: expected[name] + values[name] for name in expected}
        add = lambda a, b: a if a.dtype == jax.dtypes.float0 else a + b
        summed = part if summed is None else jax.tree.map(add, summed, part)
    assert any(name.startswith("mtp.0.") for name in expected)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, err_msg=name)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(gradient)[0], jax.tree.leaves(summed), strict=True
    ):
        if a.dtype != jax.dtypes.float0:
            bar = 1e-4 * float(jnp.abs(b).max()) + 1e-6
            assert jnp.abs(a - b).max() <= bar, jax.tree_util.keystr(path)


def test_unrolled_layers_have_the_loss_and_gradients_of_a_loop() -> None:
    cfg = models.config(*(SLIDING, HCA) * 2, hashed=0)
    model, rows = models.weights(cfg), batch(np.ones_like(TOKENS))

    def total(model: Any, unroll: bool) -> Any:
        return loss.sums(model, cfg, HF, rows, unroll=unroll)[0]["loss"]

    program = jax.jit(jax.value_and_grad(total, allow_int=True), static_argnums=1)
    jaxprs = [
        str(jax.make_jaxpr(total, static_argnums=1)(model, unroll)) for unroll in (False, True)
    ]
    assert ["unroll=2" in jaxpr for jaxpr in jaxprs] == [False, True]
    (expected, looped), (actual, unrolled) = program(model, False), program(model, True)
    assert abs(actual - expected) <= 1e-6 * abs(expected)
    for a, b in zip(jax.tree.leaves(looped), jax.tree.leaves(unrolled), strict=True):
        if a.dtype == jnp.float32:
            assert jnp.abs(a - b).max() <= 1e-4 * jnp.abs(a).max() + 1e-9


@pytest.mark.parametrize("ratio", [3, 24, 100, 256])
def test_packed_documents_are_rejected_if_an_entry_would_mix_them(ratio: int) -> None:
    cfg = models.config(SLIDING, CSA, ("csa" if ratio == 3 else "hca", ratio))

    def forward(model: Any, rows: dict[str, jax.Array], document_BT: Any) -> Any:
        return transformer.forward_rows(model, cfg, HF, rows["tokens"], document_BT)[0]

    rows, model = batch(np.ones_like(TOKENS)), models.weights(cfg)
    with pytest.raises(ValueError, match=rf"compression ratio of {ratio} .* does not divide"):
        jax.eval_shape(forward, model, rows, rows["document"])
    with pytest.raises(ValueError, match="would mix two documents"):
        jax.eval_shape(lambda model: loss.sums(model, cfg, HF, rows), model)
    assert jax.eval_shape(forward, model, rows, None).shape[:2] == TOKENS.shape
