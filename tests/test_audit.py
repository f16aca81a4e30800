"""Collectives parsed from a program's text: kinds, bytes, loops, and those that move nothing."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from v4jax import audit
from v4jax.model import sharding

TEXT = """
HloModule jit_f

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], /*index=1*/bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %gathered = bf16[16,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %alone = bf16[4,8]{1,0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add
  %kept = bf16[4,8]{1,0} copy(%x)
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %kept)
}

%fused (p.1: f32[8,4]) -> f32[2,4] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%p.1), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%pred (p.2: (s32[], bf16[4,8])) -> pred[] {
  %p.2 = (s32[], bf16[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p.2), index=0
  %last = s32[]{:T(128)} constant(9), sharding={replicated}
  ROOT %less = pred[]{:T(512)} compare(%i, %last), direction=LT
}

ENTRY %main (a: bf16[4,8], b: f32[8,4]) -> f32[2,4] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %w = (s32[], bf16[4,8]) while(%a), condition=%pred, body=%body, BACKEND
  %start = (u8[4]{0}, u8[4]{0}, u32[]) collective-permute-start(%c), source_target_pairs={{0,1}}
  %c = u8[4]{0} constant({1,2,3,4})
  %done = u8[4]{0} collective-permute-done(%start)
  ROOT %f = f32[2,4]{1,0} fusion(%b), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/psum"}
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}'


def by_kind(backend: str = KNOWN) -> dict[str, audit.Collective]:
    return {c.kind: c for c in audit.collectives(TEXT.replace("BACKEND", backend))}


def test_bytes_are_multiplied_by_trip_counts() -> None:
    gathered = by_kind()["all-gather"]
    assert gathered.times == 5
    assert gathered.bytes == 5 * 16 * 8 * 2
    assert gathered.operands == (audit.Array("bf16", (4, 8)),)
    # The TPU compiler's way of stating trip counts.
    assert by_kind("sharding={replicated}")["all-gather"].times == 9


def test_a_loop_with_a_data_dependent_end_counts_once() -> None:
    text = TEXT.replace("constant(9)", "add(%i, %i)").replace("BACKEND", "sharding={replicated}")
    assert {c.times for c in audit.collectives(text)} == {1}


def test_groups_of_one_device_move_nothing() -> None:
    assert "all-reduce" not in by_kind()


def test_fused_and_asynchronous_collectives_are_counted_once() -> None:
    assert by_kind().keys() == {"all-gather", "reduce-scatter", "collective-permute"}
    # The operand of a device, which is larger than its result.
    assert by_kind()["reduce-scatter"].bytes == 8 * 4 * 4
    permuted = by_kind()["collective-permute"]
    assert permuted.results == permuted.operands == (audit.Array("u8", (4,)),)
    total = 5 * 256 + 128 + 4
    assert (
        audit.moved(by_kind().values()) == total == sum(audit.by_kind(by_kind().values()).values())
    )


def test_moves_requires_all_dims_in_one_array() -> None:
    gathered = by_kind()["all-gather"]
    assert gathered.moves(16, 8)
    assert gathered.moves(4)
    assert not gathered.moves(16, 4)


def test_copies_are_multiplied_by_trip_counts() -> None:
    text = TEXT.replace("BACKEND", KNOWN)
    assert [audit.copies(text, *dims) for dims in [(4, 8), (8,), (16, 8)]] == [5, 5, 0]


MESH = "mesh['a'=1,'b'=8,'c'=1]"


@pytest.mark.parametrize(
    ("groups", "moves"),
    [
        ("{{0},{1}}", False),
        ("{{0,1},{2,3}}", True),
        ("[4,1]<=[4]", False),
        (MESH + " {}", False),
        (MESH + " {'a'}", False),
        (MESH + " {'a','c'}", False),
        (MESH + " {'b'}", True),
        (MESH + " {'a','b'}", True),
        (MESH + " {'b':(1)4}", True),
        (MESH + " {'b':(8)1}", False),
    ],
)
def test_every_notation_of_groups_of_one_is_recognised(groups: str, moves: bool) -> None:
    text = TEXT.replace("[2,4]<=[8], dimensions", f"{groups}, x, dimensions")
    assert ("all-gather" in {c.kind for c in audit.collectives(text)}) == moves


def test_a_compiled_program() -> None:
    mesh = sharding.make_mesh(data=8)
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x + total(x).mean(), None), x, length=7)[0]

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((16, 3)), jax.NamedSharding(mesh, P("data")))
        text = jax.jit(loop).lower(x).compile().as_text()
    (collective,) = audit.collectives(text or "")
    assert (collective.kind, collective.times) == ("all-reduce", 7)
    assert collective.bytes == 7 * 2 * 3 * 4
