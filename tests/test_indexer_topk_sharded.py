"""Devices that each hold a slice of the entries choose as one with all of them would.

Axis letters: B batch, T queries, I index heads, J index head dim, S entries, k entries chosen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import indexer_topk, targets
from pallas_kernels.indexer_topk import select_sharded, to_fp8
from tests.test_indexer_topk import case_of, hard_rows, whole_numbers

REPLICATED, SPLIT = PartitionSpec(), PartitionSpec(None, None, "context")


def sharded(mesh: Mesh, k: int, impl: Any) -> Any:
    return jax.jit(
        jax.shard_map(
            functools.partial(select_sharded, k=k, axis="context", impl=impl),
            mesh=mesh,
            in_specs=(REPLICATED, REPLICATED, SPLIT, REPLICATED, REPLICATED),
            out_specs=REPLICATED,
            check_vma=False,
        )
    )


def check(
    case: Any, visible_BT: Any, k: int, layer: int = 0, impl: str = "xla", devices: int = 8
) -> None:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("context",))
    args = [jax.tree.map(jnp.asarray, x) for x in case]
    args += [jnp.int32(layer), jnp.asarray(visible_BT, jnp.int32)]
    expected = indexer_topk.select(*args, k=k, impl="reference")
    np.testing.assert_array_equal(sharded(mesh, k, impl)(*args), expected)


@pytest.mark.parametrize(
    ("S", "k"),
    [
        (320, 16),
        (64, 20),  # more than a device holds
        (64, 100),  # more than all hold
    ],
)
def test_slices_lead_to_the_choice_from_all_entries(S: int, k: int) -> None:
    visible_BT = [[S, S - 1, 0], [1, S // 8, S // 8 + 1]]
    check(whole_numbers(S, 2, 3, 4, 8, S), visible_BT, k, layer=1)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_hard_scores_merge_exactly(devices: int) -> None:
    """Ties across devices go to the lowest index, NaN comes first, -inf before no entry."""
    rows = np.stack(list(hard_rows(320).values()))
    visible_BT = np.full((len(rows), 1), 300)
    # More than there are, and counts that would overflow an int32 in a difference.
    visible_BT[:4, 0] = 321, 2**31 - 1, -(2**31), -1
    check(case_of(rows), visible_BT, 64, devices=devices)


def test_slices_of_fp8_keys() -> None:
    q_BTIJ, weights_BTI, keys_LBSJ = whole_numbers(9, 1, 2, 4, 8, 2048)
    check((q_BTIJ, weights_BTI, to_fp8(jnp.asarray(keys_LBSJ))), [[2048, 1500]], 32)


@pytest.mark.full_compilation
def test_a_context_split_over_devices_compiles_with_the_kernel() -> None:
    """Only candidates are exchanged: per query, 512 scores and indices of each of 4 devices."""
    devices = np.array(targets.devices("v6e")[:4])
    mesh = Mesh(devices, ("context",))
    struct = lambda shape, dtype, spec=REPLICATED: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    args = (
        struct((8, 1, 64, 128), jnp.bfloat16),
        struct((8, 1, 64), jnp.float32),
        struct((2, 8, 4 * 65536, 128), jnp.bfloat16, SPLIT),
        struct((), jnp.int32),
        struct((8, 1), jnp.int32),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = sharded(mesh, 512, "auto").lower(*args).compile()
    text = program.as_text()
    assert text is not None
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert "all-gather" in text
    assert targets.temporaries(program) <= 16 * 2**20
