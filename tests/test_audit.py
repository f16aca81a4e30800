"""What is read from a program's text: kinds, bytes, loops, and exchanges that move nothing."""

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
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %x)
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


def found(backend: str = KNOWN) -> dict[str, audit.Collective]:
    return {one.kind: one for one in audit.collectives(TEXT.replace("BACKEND", backend))}


def test_bytes_are_counted_as_often_as_loops_run() -> None:
    gathered = found()["all-gather"]
    assert gathered.times == 5
    assert gathered.bytes == 5 * 16 * 8 * 2
    assert gathered.operands == (audit.Array("bf16", (4, 8)),)
    # As TPU's compiler says it.
    assert found("sharding={replicated}")["all-gather"].times == 9


def test_a_loop_that_the_data_end_counts_once() -> None:
    text = TEXT.replace("constant(9)", "add(%i, %i)").replace("BACKEND", "sharding={replicated}")
    assert {one.times for one in audit.collectives(text)} == {1}


def test_a_group_of_one_device_moves_nothing() -> None:
    assert "all-reduce" not in found()


def test_collectives_in_fusions_and_started_ones_are_seen_once() -> None:
    assert found().keys() == {"all-gather", "reduce-scatter", "collective-permute"}
    # What a device puts in, which is more than what it gets.
    assert found()["reduce-scatter"].bytes == 8 * 4 * 4
    permuted = found()["collective-permute"]
    assert permuted.results == permuted.operands == (audit.Array("u8", (4,)),)
    total = 5 * 256 + 128 + 4
    assert audit.moved(found().values()) == total == sum(audit.by_kind(found().values()).values())


def test_moves_asks_for_all_dims_of_one_array() -> None:
    gathered = found()["all-gather"]
    assert gathered.moves(16, 8)
    assert gathered.moves(4)
    assert not gathered.moves(16, 4)


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
def test_every_spelling_of_groups_of_one(groups: str, moves: bool) -> None:
    text = TEXT.replace("[2,4]<=[8], dimensions", f"{groups}, x, dimensions")
    assert ("all-gather" in {one.kind for one in audit.collectives(text)}) == moves


def test_a_programs_own_text() -> None:
    mesh = sharding.make_mesh(data=8)
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x + total(x).mean(), None), x, length=7)[0]

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((16, 3)), jax.NamedSharding(mesh, P("data")))
        text = jax.jit(loop).lower(x).compile().as_text()
    (one,) = audit.collectives(text or "")
    assert (one.kind, one.times) == ("all-reduce", 7)
    assert one.bytes == 7 * 2 * 3 * 4
