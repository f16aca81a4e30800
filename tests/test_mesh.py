"""Sharding: one program computes the same logits on one device and on eight simulated ones.

No step moves pools, experts or logits between devices.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize
from tests import exchanges, models
from v4jax import presets
from v4jax.decoding import steps
from v4jax.decoding.loaded import Loaded
from v4jax.model import cache as caches
from v4jax.model import params, sharding
from v4jax.model.numerics import HF
from v4jax.model.transformer import Model

CFG = exchanges.CFG
CAPACITY = 1100
TOKENS = models.tokens(CFG, 8, 10)


def place(mesh: Any) -> Any:
    """The model's weights, sharded by the table of axes."""
    model = models.weights(CFG)
    return jax.device_put(model, sharding.shardings(Model(CFG), mesh, model))


def run(model: Any) -> tuple[list[np.ndarray], list[str]]:
    """Logits of a prefill and of a decode step, and the text of the two programs."""
    loaded = Loaded(model, CFG, HF, jnp.float32)
    cache = caches.make(CFG, 8, CAPACITY, jnp.float32, mesh=loaded.mesh)
    on_rows = loaded.by_row
    settings = {"cfg": CFG, "numerics": HF}
    with sharding.on(loaded.mesh):
        prompt = (on_rows(TOKENS[:, :9]), cache, on_rows(np.full(8, 9, np.int32)))
        prefill = steps.prefill.lower(model, *prompt, **settings).compile()
        first, cache = prefill(model, *prompt)
        token = (on_rows(TOKENS[:, 9]), cache)
        decode = steps.decode.lower(model, *token, **settings).compile()
        second, _ = decode(model, *token)
    return [np.asarray(first), np.asarray(second)], [str(x.as_text()) for x in (prefill, decode)]


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    return run(models.weights(CFG))[0]


@pytest.mark.parametrize("sizes", exchanges.MESHES.values(), ids=exchanges.MESHES.keys())
def test_sharded_equals_one_device_and_moves_nothing_large(
    sizes: dict[str, int], expected: list[np.ndarray]
) -> None:
    actual, programs = run(place(sharding.make_mesh(**sizes)))
    for ours, theirs in zip(actual, expected, strict=True):
        # Sums over devices round in another order: 1e-5 of the largest logit.
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    for text in programs:
        assert not exchanges.large(text)


def test_experts_are_never_gathered() -> None:
    mesh = sharding.make_mesh(fsdp=2, expert=4)
    with jax.set_mesh(mesh):
        model = place(mesh)
        cache = caches.make(CFG, 8, 32, jnp.float32)
        tokens_B = jnp.zeros(8, jnp.int32)
        program = steps.decode.lower(model, tokens_B, cache, cfg=CFG, numerics=HF).compile()
    F, D = CFG.moe_intermediate_size, CFG.hidden_size
    text = program.as_text() or ""
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    assert gathered, "the tokens should be gathered"
    # Experts are stacked; the shared expert, which is split over hidden dims, is a plain matrix.
    assert not [dims for dims in gathered if re.fullmatch(rf"(\d+,)+({F},{D}|{D},{F})", dims)]


def test_each_device_holds_its_own_experts() -> None:
    mesh = sharding.make_mesh(fsdp=2, expert=4)
    experts = {name: x for name, x in params.leaves(place(mesh)) if ".experts." in name}
    # Three matrices per layer; no two layers are of the same kind.
    assert len(experts) == 3 * len(CFG.layers)
    for name, value in experts.items():
        assert len(value.addressable_shards) == CFG.n_routed_experts, name
        assert {shard.data.shape[1] for shard in value.addressable_shards} == {1}, name
        starts = {shard.index[1].start for shard in value.addressable_shards}
        assert starts == set(range(CFG.n_routed_experts)), name


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_every_axis_of_the_full_models_has_a_rule_and_quantised_leaves_are_sharded(
    name: str,
) -> None:
    cfg = presets.get(name)
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    declared = Model(cfg)
    abstract = params.abstract(declared, jnp.bfloat16, cfg.expert_dtype)
    placed = sharding.shardings(declared, mesh, abstract)
    per_device = sum(
        np.prod(place.shard_shape(struct.shape)) * struct.dtype.itemsize
        for place, struct in zip(jax.tree.leaves(placed), jax.tree.leaves(abstract), strict=True)
    )
    total = sum(struct.size * struct.dtype.itemsize for struct in jax.tree.leaves(abstract))
    # Experts are nine tenths of the bytes and split four ways; the rest two ways or not at all.
    assert per_device < 0.3 * total


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(KeyError, match="headz"):
        sharding.partition_spec(("headz",))


def test_a_mesh_of_the_wrong_size_says_how_many_devices_there_are() -> None:
    with pytest.raises(ValueError, match="there are 8"):
        sharding.make_mesh(expert=3)


def test_constrain_does_nothing_without_a_mesh() -> None:
    x = jnp.ones((3, 2))
    assert sharding.constrain(x, "batch", None) is x


def test_quantised_experts_shard_like_dense_ones() -> None:
    mesh = sharding.make_mesh(fsdp=2, expert=4)
    cfg = dataclasses.replace(CFG, quantized=True, expert_dtype="fp4")
    declared = Model(cfg)
    placed = sharding.shardings(declared, mesh, params.abstract(declared, jnp.bfloat16, "fp4"))
    gate = placed.stacks[0].experts[0].gate_EFD.get_value()
    assert isinstance(gate, quantize.Fp4Weight)
    assert gate.codes.spec[1] == gate.scale.spec[1] == ("expert", "fsdp", "tensor")
