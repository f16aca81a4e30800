"""Bytes in HBM and operations of programs: slices, updates in place, kernels, loops."""

import jax
import jax.numpy as jnp
import pytest

from v4jax import audit, traffic
from v4jax.hlo import Program

TEXT = """
HloModule jit_f

%sliced (stack: f32[8,4,16], i: s32[]) -> f32[4,16] {
  %stack = f32[8,4,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,4,16]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,4,16}
  ROOT %bits = f32[4,16]{1,0} bitcast(%one)
}

%updated (ring: bf16[64,16], new: bf16[1,16]) -> bf16[64,16] {
  %ring = bf16[64,16]{1,0} parameter(0)
  %new = bf16[1,16]{1,0} parameter(1)
  ROOT %put = bf16[64,16]{1,0} dynamic-update-slice(%ring, %new, %zero, %zero)
}

ENTRY %main (s: f32[8,4,16], r: bf16[64,16], w: f8e4m3fn[2,1024,1024], x: bf16[8,1024]) -> f32[] {
  %s = f32[8,4,16]{2,1,0} parameter(0)
  %r = bf16[64,16]{1,0} parameter(1)
  %w = f8e4m3fn[2,1024,1024]{2,1,0} parameter(2)
  %x = bf16[8,1024]{1,0} parameter(3)
  LINE
}
"""
SIZE = 1024 * 1024


def measured(line: str) -> traffic.Traffic:
    return traffic.measure(TEXT.replace("LINE", line), traffic.Experts(active=0.25, rows=2))


@pytest.mark.parametrize(
    ("line", "read", "written"),
    [
        ("%a = f32[4,16]{1,0} fusion(%s, %i), kind=kLoop, calls=%sliced", 256, 256),
        ("%a = bf16[64,16]{1,0} fusion(%r, %n), kind=kLoop, calls=%updated", 32, 32),
        ("%a = bf16[64,16]{1,0:T(8,128)S(1)} copy(%r)", 2048, 0),
        ("%a = (bf16[8]{0:S(1)}, bf16[8]{0}, u32[]) copy-start(%r), x", 16, 0),
        ("%a = bf16[2,16]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,16}", 64, 64),
        ("%a = bf16[64,16]{1,0} get-tuple-element(%t), index=1", 0, 0),
    ],
    ids=["slice", "update", "to VMEM", "prefetch", "dynamic slice", "free"],
)
def test_operations_move_what_they_touch(line: str, read: int, written: int) -> None:
    constants = "%i = s32[]{:S(1)} constant(0)\n  %n = bf16[1,16]{1,0} constant({...})\n  "
    result = measured(constants + line)
    assert (result.read, result.written) == (read, written)


def kernel(name: str, result: str, operands: str) -> traffic.Traffic:
    layer = "%l = s32[1]{0:S(1)} constant({0})\n  "
    call = f'%{name}.7 = {result} custom-call({operands}), custom_call_target="tpu_custom_call"'
    return measured(layer + call)


def test_a_kernel_reads_one_layer_of_a_stack() -> None:
    result = kernel("linear_few_rows", "bf16[8,1024]{1,0}", "%l, %x, %w")
    assert result.read == SIZE + 2 * 8 * 1024
    assert result.written == 2 * 8 * 1024
    assert result.flops == 2 * 8 * SIZE


def test_kernels_of_experts_read_those_that_have_tokens() -> None:
    text = TEXT.replace("w: f8e4m3fn[2,1024,1024]", "w: u8[2,4,512,1024]")
    text = text.replace("%w = f8e4m3fn[2,1024,1024]{2,1,0}", "%w = u8[2,4,512,1024]{3,2,1,0}")
    call = '%experts_out.1 = bf16[8,1024]{1,0} custom-call(%x, %w), x="tpu_custom_call"'
    result = traffic.measure(text.replace("LINE", call), traffic.Experts(active=0.25, rows=2))
    assert result.read == 512 * 1024 + 2 * 8 * 1024
    assert result.flops == 2 * 2 * SIZE


def test_float32_copies_of_fp8_weights_are_found() -> None:
    copied = "%a = f32[1024,1024]{1,0} convert(%w)"
    assert measured(copied).wide_weights == 4 * SIZE
    assert measured(copied.replace("{1,0}", "{1,0:T(8,128)S(1)}")).wide_weights == 0
    assert measured(copied.replace("f32", "bf16")).wide_weights == 0


def test_the_operations_of_a_compiled_loop() -> None:
    def loop(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.dot(x, w), None), x, length=7)[0]

    structs = jax.ShapeDtypeStruct((16, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), "float32")
    text = jax.jit(loop).lower(*structs).compile().as_text()
    assert traffic.measure(text or "").flops == 7 * 2 * 16 * 64 * 64


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups={}", 0),
    ],
)
def test_the_size_of_a_collectives_groups(groups: str, group: int) -> None:
    line = f"%a = bf16[64,16]{{1,0}} all-reduce(%r), {groups}, to_apply=%add"
    (collective,) = audit.collectives(Program(TEXT.replace("LINE", line)))
    assert collective.group == group
