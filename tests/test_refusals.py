"""A wrong argument gets one error that names it, whichever form would run."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    compress,
    dense_attention,
    grouped_matmul,
    hyper,
    indexer_topk,
    quantize,
    rotary,
    sparse_attention,
)
from pallas_kernels.grouped_matmul import LoraWeight
from pallas_kernels.indexer_topk import to_fp4, to_fp8
from pallas_kernels.paged import Paged
from pallas_kernels.quantize import Fp4Weight, Fp8Weight
from pallas_kernels.sparse_attention import Fp8Rows

FORMS = ("auto", "reference", "xla", "tpu", "gpu")


def ones(*shape: int, dtype: Any = jnp.float32) -> Any:
    # Created by NumPy: in JAX each shape would need a program.
    return jax.device_put(np.ones(shape, dtype))


KEYS = ones(2, 2, 300, 64)
FP8_KEYS, FP4_KEYS = (
    jax.tree.map(lambda x: ones(*x.shape, dtype=x.dtype), jax.eval_shape(to, KEYS))
    for to in (to_fp8, to_fp4)
)
PAGES = Paged(ones(2, 9, 20, 64), ones(2, 15, dtype=jnp.int32))
INDEXER: dict[str, Any] = {
    "q_BTIJ": ones(2, 3, 4, 64),
    "weights_BTI": ones(2, 3, 4),
    "keys": KEYS,
    "layer": jnp.int32(1),
    "visible_BT": ones(2, 3, dtype=jnp.int32),
    "k": 16,
}
FP8 = Fp8Weight(ones(2, 4, 256, 128, dtype=jnp.float8_e4m3fn), ones(2, 4, 2, 1))
FP4 = Fp4Weight(ones(2, 4, 128, 128, dtype=jnp.uint8), ones(2, 4, 8, 128, dtype=jnp.float8_e8m0fnu))
LORA = LoraWeight(ones(2, 4, 128, 256), ones(2, 4, 8, 256), ones(2, 4, 128, 8), 0.5)
EXPERTS: dict[str, Any] = {
    "x_TD": ones(5, 256),
    "expert_TA": ones(5, 2, dtype=jnp.int32),
    "weight_TA": ones(5, 2),
    "w1_LEFD": ones(2, 4, 128, 256),
    "w3_LEFD": ones(2, 4, 128, 256),
    "w2_LEDF": ones(2, 4, 256, 128),
    "layer": jnp.int32(0),
    "limit": 2.0,
    "weight_first": True,
}
MATRIX = Fp8Weight(ones(256, 128, dtype=jnp.float8_e4m3fn), ones(2, 1))
NORM = {"eps": 1e-6, "norm_eps": 1e-6}
PRE = {"x_BTM": ones(1, 3, 256), "fn_QM": ones(8, 256), "base_Q": ones(8), "scale_3": ones(3)}
PRE |= NORM | {"streams": 2, "steps": 2}
POST = {"output_BTD": ones(1, 3, 128), "x_BTM": ones(1, 3, 256)}
POST |= {"post_BTN": ones(1, 3, 2), "comb_BTNN": ones(1, 3, 2, 2)}
HEADS = {"x_BTHK": ones(1, 3, 2, 16), "cos_BTQ": ones(1, 3, 4), "sin_BTQ": ones(1, 3, 4)}
INTEGERS = ones(2, 3, dtype=jnp.int32)
ATTENTION = {"q_BTHK": ones(2, 3, 4, 512), "pool_LBSK": ones(2, 2, 32, 512), "layer": jnp.int32(1)}
ATTENTION |= {"sink_H": ones(4), "scale": 1.0}
RING = {"window_BRK": ones(2, 8, 512), "window_mask_BTR": ones(2, 3, 8, dtype=bool)}
CHUNK = {"window_BXK": ones(2, 11, 512), "start_B": INTEGERS[:, 0], "window": 8}
WINDOWS = {"bias_MC": ones(4, 256), "scale_K": ones(128), "table": (ones(2, 3, 16), ones(2, 3, 16))}
WINDOWS |= {"overlap": 2, "eps": 1e-6, "rounding": "fp8", "dtype": jnp.float32}
PREFILL = {"rows_BTC": ones(2, 11, 512), "before_BPC": ones(2, 8, 512), "start_B": INTEGERS[:, 0]}
DECODE = {"ring_LBRC": ones(2, 2, 16, 512), "layer": jnp.int32(1), "window_B": INTEGERS[:, 0]}
DECODE |= {"table": (ones(2, 1, 16), ones(2, 1, 16))}
POOL = {"kv_BXC": ones(2, 12, 256), "gate_BXC": ones(2, 12, 256), "first_B": INTEGERS[:, 0]}
POOL |= {"bias_MC": ones(4, 256), "overlap": 2}
HEAD = {
    "x_BTM": ones(1, 3, 256),
    "fn_NM": ones(2, 256),
    "base_N": ones(2),
    "scale_1": ones(1),
    **NORM,
}


def changed(tree: Any, **parts: Any) -> Any:
    return dataclasses.replace(tree, **parts)


def assert_refused(
    op: Any, args: dict[str, Any], wrong: dict[str, Any], error: Any, match: str
) -> None:
    for impl in FORMS:
        with pytest.raises(error, match=match):
            # Bypasses the annotation checks, which would reject some of these first.
            inspect.unwrap(op)(**args | wrong, impl=impl)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"k": 0}, ValueError, "k is 0; it must be an integer >= 1"),
        ({"k": -3}, ValueError, "k is -3"),
        ({"k": 2.0}, ValueError, r"k is 2\.0"),
        ({"visible_BT": ones(2, 4, dtype=jnp.int32)}, ValueError, r"visible_BT .* \(B=2, T=3\)"),
        ({"visible_BT": ones(2, dtype=jnp.int32)}, ValueError, r"visible_BT has shape \(2,\)"),
        (
            {"visible_BT": ones(2, 3)},
            TypeError,
            "visible_BT is float32; it must have a signed integer dtype",
        ),
        ({"hidden_BT": ones(3, 3, dtype=jnp.int32)}, ValueError, r"hidden_BT .* \(B=2, T=3\)"),
        (
            {"hidden_BT": ones(2, 3)},
            TypeError,
            "hidden_BT is float32; it must have a signed integer dtype",
        ),
        ({"layer": ones(1, dtype=jnp.int32)}, ValueError, r"layer has shape \(1,\), not \(\)"),
        (
            {"q_BTIJ": ones(2, 3, 4, 64, dtype=jnp.int8)},
            TypeError,
            "q_BTIJ is int8; .* floating-point",
        ),
        ({"weights_BTI": ones(2, 3, 3)}, ValueError, r"weights_BTI .*I=4\)"),
        ({"keys": KEYS[..., :32]}, ValueError, r"keys_LBSJ .*J=64\)"),
        ({"keys": KEYS[0]}, ValueError, r"keys_LBSJ has shape \(2, 300, 64\)"),
        ({"keys": KEYS[:, :1]}, ValueError, r"keys_LBSJ .*B=2"),
        (
            {"keys": changed(FP8_KEYS, scale=FP8_KEYS.scale[:, :, :1])},
            ValueError,
            r"keys\.scale_LBGE .*G=3",
        ),
        (
            {"keys": changed(FP8_KEYS, codes=FP8_KEYS.codes.view(jnp.uint8))},
            TypeError,
            r"keys\.codes is uint8; it must be float8_e4m3fn",
        ),
        (
            {"keys": changed(FP4_KEYS, scale=FP4_KEYS.scale[..., :128])},
            ValueError,
            r"keys\.scale_LBGE .*E=256",
        ),
        (
            {"keys": changed(FP4_KEYS, codes=FP4_KEYS.codes[:, :, 1:])},
            ValueError,
            r"keys\.codes_LBHS .*H=32",
        ),
        ({"keys": changed(PAGES, table=PAGES.table[:1])}, ValueError, r"keys\.table_BM .*B=2"),
    ],
)
def test_the_indexer_refuses_wrong_arguments(wrong: dict[str, Any], error: Any, match: str) -> None:
    assert_refused(indexer_topk.select, INDEXER, wrong, error, rf"^indexer_topk\.select: {match}")


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"x_TD": ones(5, 128)}, ValueError, r"w1_LEFD .*D=128\)"),
        ({"x_TD": ones(5, 256, dtype=jnp.int32)}, TypeError, "x_TD is int32"),
        ({"expert_TA": ones(3, 2, dtype=jnp.int32)}, ValueError, r"expert_TA .* \(T=5, A\)"),
        ({"expert_TA": ones(5, 2)}, TypeError, "expert_TA is float32"),
        ({"weight_TA": ones(5, 1)}, ValueError, r"weight_TA .*A=2\)"),
        ({"w1_LEFD": ones(4, 128, 256)}, ValueError, r"w1_LEFD .* \(L, E, F, D=256\)"),
        ({"w3_LEFD": ones(2, 4, 64, 256)}, ValueError, r"w3_LEFD .*F=128"),
        ({"w2_LEDF": ones(2, 3, 256, 128)}, ValueError, r"w2_LEDF .*E=4"),
        ({"w2_LEDF": ones(2, 4, 128, 256)}, ValueError, r"w2_LEDF .*D=256, F=128"),
        ({"w1_LEFD": changed(FP8, scale=FP8.scale[:, :, :1])}, ValueError, r"w1_LEFD\.scale"),
        (
            {"w1_LEFD": changed(FP4, scale=FP4.scale.astype(jnp.float32))},
            TypeError,
            r"w1_LEFD\.scale is float32; it must be float8_e8m0fnu",
        ),
        ({"w3_LEFD": changed(LORA, a=LORA.a[:, :, :4])}, ValueError, r"w3_LEFD\.b_LENr .* r=4"),
        ({"w3_LEFD": changed(LORA, b=LORA.b[:, :, :64])}, ValueError, r"w3_LEFD\.b_LENr .*N=128"),
    ],
)
def test_experts_refuse_wrong_arguments(wrong: dict[str, Any], error: Any, match: str) -> None:
    op = grouped_matmul.expert_mlp
    assert_refused(op, EXPERTS, wrong, error, rf"^grouped_matmul\.expert_mlp: {match}")


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"x": ones(2, 128)}, ValueError, "x has 128 channels; .* take 256"),
        ({"x": ones(2, 256, dtype=jnp.int32)}, TypeError, "x is int32"),
        ({"x": jnp.float32(1)}, ValueError, "x has no dims"),
        ({"w": ones(3, 4, 256)}, ValueError, r"w stands for \(3, 4, 256\)"),
        ({"w": changed(MATRIX, scale=ones(3, 1))}, ValueError, r"w\.scale has shape \(3, 1\)"),
        ({"w": changed(MATRIX, codes=ones(256, 128))}, TypeError, r"w\.codes is float32"),
        ({"layer": 0.0}, TypeError, "layer is float32; it must have a signed integer dtype"),
        ({"layer": np.bool_(1)}, TypeError, "layer is bool"),
        ({"layer": ones(1, dtype=jnp.int32)}, ValueError, r"layer has shape \(1,\), not \(\)"),
    ],
)
def test_a_matmul_refuses_wrong_arguments(wrong: dict[str, Any], error: Any, match: str) -> None:
    args = {"x": ones(2, 256), "w": MATRIX}
    assert_refused(quantize.linear, args, wrong, error, rf"^quantize\.linear: {match}")


@pytest.mark.parametrize("op", [quantize.fake_quant_fp8, quantize.fake_quant_fp4])
def test_a_rounding_refuses_wrong_arguments(op: Any) -> None:
    args = {"x": ones(2, 64), "block": 32}
    for block in (0, -1, 2.0):
        assert_refused(op, args, {"block": block}, ValueError, f"block is {block}")
    assert_refused(op, args, {"x": ones(2, 64, dtype=jnp.int32)}, TypeError, "x is int32")
    assert_refused(op, args, {"x": np.float32(1)}, ValueError, "x has no dims")


@pytest.mark.parametrize(
    ("name", "wrong", "match"),
    [
        ("pre", {"fn_QM": ones(7, 256)}, "fn_QM .*Q=8"),
        ("pre", {"base_Q": ones(7)}, "base_Q .*Q=8"),
        ("pre", {"scale_3": ones(1)}, r"scale_3 has shape \(1,\), not \(3\)"),
        ("pre", {"steps": 0}, "2 streams and 0 steps"),
        (
            "pre",
            {"x_BTM": ones(1, 3, 255), "fn_QM": ones(8, 255)},
            "x_BTM has 255 channels, not 2 equal",
        ),
        ("post", {"output_BTD": ones(1, 3, 64)}, "output_BTD .*D=128"),
        ("post", {"comb_BTNN": ones(1, 3, 2, 3)}, "comb_BTNN .*N=2, N=2"),
        ("head", {"base_N": ones(3)}, "base_N .*N=2"),
    ],
)
def test_hyper_connections_refuse_wrong_arguments(
    name: str, wrong: dict[str, Any], match: str
) -> None:
    args: Any = {"pre": PRE, "post": POST, "head": HEAD}[name]
    assert_refused(getattr(hyper, name), args, wrong, ValueError, rf"^hyper\.{name}: {match}")


@pytest.mark.parametrize("op", [dense_attention, sparse_attention])
@pytest.mark.parametrize(
    ("name", "wrong", "error", "match"),
    [
        ("decode", {"q_BTHK": ones(2, 3, 2048)}, ValueError, r"q_BTHK has shape \(2, 3, 2048\)"),
        ("decode", {"window_BRK": ones(2, 8, 64)}, ValueError, r"window_BRK .* \(B=2, R, K=512\)"),
        (
            "decode",
            {"window_mask_BTR": ones(2, 3, 8, dtype=jnp.int32)},
            TypeError,
            "window_mask_BTR is int32; it must have a boolean dtype",
        ),
        ("decode", {"window_mask_BTR": ones(2, 3, 7, dtype=bool)}, ValueError, "window_mask_BTR"),
        ("decode", {"pool_LBSK": ones(2, 32, 512)}, ValueError, "pool_LBSK has shape"),
        ("decode", {"pool_LBSK": ones(2, 1, 32, 512)}, ValueError, "pool_LBSK .*B=2"),
        ("decode", {"layer": jnp.float32(1)}, TypeError, "layer is float32"),
        ("decode", {"sink_H": ones(3)}, ValueError, r"sink_H has shape \(3,\), not \(H=4\)"),
        ("prefill", {"window_BXK": ones(1, 11, 512)}, ValueError, "window_BXK .*B=2"),
        ("prefill", {"window_BXK": ones(2, 12, 512)}, ValueError, "window_BXK has 12 keys"),
        (
            "prefill",
            {"start_B": ones(2)},
            TypeError,
            "start_B is float32; it must have a signed integer dtype",
        ),
        ("prefill", {"start_B": INTEGERS}, ValueError, "start_B has shape"),
        ("prefill", {"layer": INTEGERS[0]}, ValueError, r"layer has shape \(3,\), not \(\)"),
    ],
)
def test_attention_refuses_wrong_arguments(
    op: Any, name: str, wrong: Any, error: Any, match: str
) -> None:
    entries = (
        {"visible_BT": INTEGERS} if op is dense_attention else {"indices_BTk": INTEGERS[..., None]}
    )
    args: Any = ATTENTION | entries | (RING if name == "decode" else CHUNK)
    short = op.__name__.rpartition(".")[2]
    assert_refused(getattr(op, name), args, wrong, error, rf"^{short}\.{name}: {match}")


def test_attention_refuses_wrong_bounds_of_documents() -> None:
    dense: Any = ATTENTION | CHUNK | {"visible_BT": INTEGERS}
    sparse: Any = ATTENTION | CHUNK | {"indices_BTk": INTEGERS[..., None]}
    for run, args, name in (
        (dense_attention.prefill, dense, "first_BT"),
        (dense_attention.prefill, dense, "hidden_BT"),
        (sparse_attention.prefill, sparse, "first_BT"),
    ):
        assert_refused(run, args, {name: INTEGERS[:, :2]}, ValueError, rf"prefill: {name} .*T=3\)")
        assert_refused(run, args, {name: ones(2, 3)}, TypeError, f"prefill: {name} is float32")


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_attention_refuses_wrong_entries(name: str) -> None:
    chunk: Any = ATTENTION | (RING if name == "decode" else CHUNK)
    dense, args = getattr(dense_attention, name), chunk | {"visible_BT": INTEGERS}
    assert_refused(dense, args, {"visible_BT": INTEGERS[:, :2]}, ValueError, r"visible_BT .*T=3\)")
    assert_refused(dense, args, {"visible_BT": ones(2, 3)}, TypeError, "visible_BT is float32")
    sparse, args = getattr(sparse_attention, name), chunk | {"indices_BTk": INTEGERS[..., None]}
    data = ones(2, 2, 32, 640, dtype=jnp.uint8)
    for wrong, error, match in (
        ({"indices_BTk": INTEGERS}, ValueError, r"indices_BTk has shape \(2, 3\)"),
        ({"indices_BTk": ones(2, 3, 1)}, TypeError, "indices_BTk is float32"),
        ({"pool_LBSK": data}, TypeError, "pool_LBSK is uint8; it must have a floating-point dtype"),
        ({"pool_LBSK": Fp8Rows(data[..., :584])}, ValueError, r"pool_LBSK\.data_LBSW .*W=640"),
        ({"pool_LBSK": Fp8Rows(data[:, :1])}, ValueError, r"pool_LBSK\.data_LBSW .*B=2"),
        (
            {"pool_LBSK": Fp8Rows(data.view(jnp.int8))},
            TypeError,
            r"pool_LBSK\.data is int8; it must be uint8",
        ),
    ):
        assert_refused(sparse, args, wrong, error, match)
    narrow: Any = {"q_BTHK": ones(2, 3, 4, 64), "pool_LBSK": Fp8Rows(data)}
    narrow["window_BRK" if name == "decode" else "window_BXK"] = ones(
        2, 8 + 3 * (name != "decode"), 64
    )
    assert_refused(sparse, args, narrow, ValueError, r"pool_LBSK has shape \(2, 2, 32, 512\).*K=64")


@pytest.mark.parametrize(
    ("name", "wrong", "error", "match"),
    [
        ("prefill", {"overlap": 3}, ValueError, "overlap is 3; it must be 1 or 2"),
        ("prefill", {"rounding": "bf16"}, ValueError, "rounding is 'bf16'"),
        ("prefill", {"rows_BTC": ones(2, 11, 256)}, ValueError, "rows_BTC .*C=512"),
        ("prefill", {"before_BPC": ones(2, 4, 512)}, ValueError, "before_BPC .*P=8"),
        ("prefill", {"start_B": ones(2)}, TypeError, "start_B is float32"),
        ("prefill", {"bias_MC": ones(256)}, ValueError, "bias_MC has shape"),
        ("prefill", {"bias_MC": ones(4, 255)}, ValueError, r"bias_MC .* \(M, 2 \* K\)"),
        ("prefill", {"scale_K": ones(64)}, ValueError, "scale_K .*K=128"),
        ("prefill", {"table": (ones(2, 2, 16),) * 2}, ValueError, r"table\[0\]_BnQ .*n=3"),
        (
            "prefill",
            {"table": (ones(2, 3, 16), ones(2, 3, 8))},
            ValueError,
            r"table\[1\]_BnQ .*Q=16",
        ),
        ("prefill", {"table": (ones(2, 3, 65),) * 2}, ValueError, "scale_K has 128 channels; 65"),
        ("decode", {"ring_LBRC": ones(2, 16, 512)}, ValueError, "ring_LBRC has shape"),
        (
            "decode",
            {"ring_LBRC": ones(2, 2, 16, 512, dtype=jnp.int8)},
            TypeError,
            "ring_LBRC is int8",
        ),
        ("decode", {"layer": INTEGERS[0, :1]}, ValueError, r"layer has shape \(1,\)"),
        ("decode", {"window_B": ones(2)}, TypeError, "window_B is float32"),
        ("decode", {"window_B": INTEGERS[0]}, ValueError, "window_B .*B=2"),
        ("decode", {"table": WINDOWS["table"]}, ValueError, r"table\[0\]_BnQ .*n=1"),
        ("pool", {"gate_BXC": ones(2, 8, 256)}, ValueError, "gate_BXC .*X=12"),
        ("pool", {"bias_MC": ones(4, 128)}, ValueError, "kv_BXC .*C=128"),
        ("pool", {"bias_MC": ones(5, 256)}, ValueError, r"kv_BXC has 12 tokens, .* n \+ 1 .* of 5"),
        ("pool", {"first_B": ones(2)}, TypeError, "first_B is float32"),
    ],
)
def test_compression_refuses_wrong_arguments(name: str, wrong: Any, error: Any, match: str) -> None:
    args: Any = {"prefill": WINDOWS | PREFILL, "decode": WINDOWS | DECODE, "pool": POOL}[name]
    assert_refused(getattr(compress, name), args, wrong, error, rf"^compress\.{name}: {match}")


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"x_BTHK": ones(1, 3, 16)}, ValueError, r"x_BTHK has shape \(1, 3, 16\)"),
        ({"x_BTHK": ones(1, 3, 2, 16, dtype=jnp.int32)}, TypeError, "x_BTHK is int32"),
        ({"cos_BTQ": ones(1, 2, 4)}, ValueError, "cos_BTQ .*T=3"),
        ({"sin_BTQ": ones(1, 3, 5)}, ValueError, "sin_BTQ .*Q=4"),
        ({"x_BTHK": ones(1, 3, 2, 6)}, ValueError, "x_BTHK has 6 channels; 4 pairs"),
    ],
)
def test_rotary_refuses_wrong_arguments(wrong: dict[str, Any], error: Any, match: str) -> None:
    assert_refused(rotary.rotate, HEADS, wrong, error, rf"^rotary\.rotate: {match}")


@pytest.mark.parametrize("op", [dense_attention, sparse_attention, compress])
def test_a_layer_may_be_a_python_int(op: Any) -> None:
    args = WINDOWS | DECODE if op is compress else ATTENTION | RING
    entries = {dense_attention: {"visible_BT": INTEGERS}, compress: {}}
    args |= entries.get(op, {"indices_BTk": INTEGERS[..., None]})
    run = inspect.unwrap(op.decode)
    np.testing.assert_array_equal(run(**args | {"layer": 1}), run(**args))
