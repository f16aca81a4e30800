"""Meshes: their device order on a TPU's torus, what they must divide, how they are written."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

import v4jax
from pallas_kernels import targets
from tests import checkpoints, models
from v4jax import aot, presets
from v4jax.checkpoints import random_release
from v4jax.model import params, sharding
from v4jax.model.config import ModelConfig
from v4jax.model.transformer import Model


def hops(mesh: Mesh, axis: str, torus: tuple[int, ...]) -> float:
    """Mean distance between neighbours on an axis, its two ends included."""
    coords = np.array([device.coords[: len(torus)] for device in mesh.devices.flat])
    coords = coords.reshape(*mesh.devices.shape, len(torus))
    apart = np.abs(coords - np.roll(coords, -1, mesh.axis_names.index(axis)))
    return float(np.minimum(apart, np.array(torus) - apart).sum(-1).mean())


@pytest.mark.parametrize(
    ("topology", "torus", "sizes", "limits"),
    [
        ("v6e:8x8", (8, 8), {"expert": 8, "tensor": 8}, {"expert": 1.0, "tensor": 1.0}),
        ("v5p:4x4x8", (4, 4, 8), {"data": 16, "expert": 8}, {"data": 1.25, "expert": 1.0}),
        ("v5p:4x4x8", (4, 4, 8), {"fsdp": 8, "expert": 16}, {"fsdp": 1.0, "expert": 1.25}),
        ("v5p:4x4x4", (4, 4, 4), {"expert": 64}, {"expert": 1.4}),
        # Axes that take part of a side of the torus.
        ("v6e:16x16", (16, 16), {"expert": 128, "tensor": 2}, {"expert": 1.2, "tensor": 1.0}),
    ],
)
def test_neighbours_on_an_axis_are_neighbours_on_the_torus(
    topology: str, torus: tuple[int, ...], sizes: dict[str, int], limits: dict[str, float]
) -> None:
    mesh = aot.topology_mesh(topology, **sizes)
    assert {
        axis: hops(mesh, axis, torus) <= limit for axis, limit in limits.items()
    } == dict.fromkeys(limits, True)
    assert len(set(mesh.devices.flat)) == mesh.size


def test_chips_that_do_not_form_a_block_keep_their_order() -> None:
    chips = targets.devices("v6e")[:3]
    assert sharding.make_mesh(expert=3, devices=chips).devices.ravel().tolist() == list(chips)


def test_processes_hold_the_groups_of_their_chips() -> None:
    mesh = aot.topology_mesh("v6e:8x8", expert=8, tensor=8)
    processes = {device.process_index for device in mesh.devices.flat}
    groups_of = {process: sharding.groups_of(mesh, process) for process in processes}
    for process, groups in groups_of.items():
        owned = [d for group in groups for d in mesh.devices.reshape(8, 8)[group]]
        assert {d for d in mesh.devices.flat if d.process_index == process} <= set(owned)
    assert set(itertools.chain(*groups_of.values())) == set(range(8))
    assert sharding.groups_of(None) == [0]


def placed(cfg: ModelConfig, **sizes: int) -> Any:
    """The model's shardings on a mesh of any size, with weights as the release stores them."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    mesh = AbstractMesh(shape, sharding.AXES)
    declared = Model(cfg)
    return sharding.shardings(
        declared, mesh, params.abstract(declared, jnp.bfloat16, cfg.expert_dtype)
    )


@pytest.mark.parametrize(
    ("preset", "sizes", "parts"),
    [
        (
            "pro",
            {"expert": 256},
            ("expert 256", "dim of 384", "data 2, fsdp 1, expert 128, tensor"),
        ),
        ("pro", {"fsdp": 16, "expert": 16}, ("expert 16 x fsdp 16", "384")),
        ("flash", {"expert": 512}, ("dim of 256", "data 2, fsdp 1, expert 256, tensor 1")),
        ("flash", {"tensor": 3}, ("tensor 3", "The nearest mesh that works has")),
        ("flash", {"fsdp": 48}, ("A mesh of fsdp 48 ", "dim of 4096", "of embed_VD and")),
        ("flash", {"data": 5, "expert": 7}, ("expert 7", "data 35, fsdp 1, expert 1, tensor 1")),
    ],
)
def test_a_mesh_that_does_not_divide_a_large_weight_is_refused(
    preset: str, sizes: dict[str, int], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="does not divide a dim") as caught:
        placed(presets.get(preset), **sizes)
    for part in parts:
        assert part in str(caught.value)


def test_the_suggested_mesh_works_and_the_bytes_are_per_device() -> None:
    pro = presets.get("pro")
    # 384 experts in each of 62 layers, three matrices of 7168 x 3072, at 4.25 bits a weight.
    with pytest.raises(ValueError, match=r"hold all of it: 778\.1 GiB of .* and 29 others"):
        placed(pro, expert=256)
    placed(pro, data=2, expert=128)


def test_small_weights_may_be_replicated() -> None:
    experts = models.config(models.CSA, n_routed_experts=6)
    gate = placed(experts, expert=4).stacks[0].experts[0].gate_EFD.get_value()
    assert gate.is_fully_replicated


@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_lowering_refuses_meshes_and_batches_that_do_not_fit(step: Any) -> None:
    flash, mesh = presets.get("flash"), sharding.make_mesh(expert=8)
    with pytest.raises(ValueError, match=r"batch of 12 rows .* 8 groups .* multiple of 8"):
        aot.arguments(flash, step, mesh, batch=12, capacity=128)
    other = sharding.make_mesh(tensor=7, devices=jax.devices()[:7])
    with pytest.raises(ValueError, match="tensor 7 does not divide"):
        aot.arguments(flash, step, other, batch=1, capacity=128)


def test_a_single_row_is_replicated_and_several_are_split() -> None:
    mesh = sharding.make_mesh(data=2, tensor=4)
    for batch, parts in ((1, 1), (4, 2)):
        _, tokens_B, cache = aot.arguments(
            models.config(models.CSA), "decode", mesh, batch=batch, capacity=128
        )
        pool = cache.segments[0][0].pool_LBSK
        for struct, rows in ((tokens_B, 0), (pool, 1)):
            assert struct.sharding.shard_shape(struct.shape)[rows] == batch // parts


def test_loading_refuses_a_mesh_before_it_reads(tmp_path: Any) -> None:
    random_release.make_checkpoint(tmp_path / "model", checkpoints.tiny(), 0)
    other = Mesh(np.array(jax.devices()), ("x",))
    calls: list[Any] = []
    with pytest.raises(
        ValueError, match=r"mesh is .*; it must be .* from v4jax\.model\.sharding\.make_mesh"
    ):
        v4jax.load(tmp_path / "model", mesh=other, progress=lambda *args: calls.append(args))
    assert not calls


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tensor",
        "tensor=0",
        "tensor=-1",
        "tensor=8,tensor=1",
        "model=8",
        "tensor=8.0",
        "tensor=\u00b2",
    ],
)
def test_invalid_mesh_texts_are_answered_with_the_known_axes(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a mesh; .*data, fsdp, expert, tensor.* 8, the"):
        sharding.read_mesh(text)


def test_mesh_texts() -> None:
    assert dict(sharding.read_mesh("expert=4, tensor=2").shape) == {
        "data": 1,
        "fsdp": 1,
        "expert": 4,
        "tensor": 2,
    }
    with pytest.raises(ValueError, match="needs 4 devices; there are 8"):
        sharding.read_mesh("tensor=4")
    with pytest.raises(ValueError, match="data is -1; it must be an integer of 1 or more"):
        sharding.make_mesh(data=-1, expert=-8)
