"""A wrong argument gets one answer that names it, whatever form would run."""

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
from pallas_kernels.indexer_topk import PagedKeys, to_fp4, to_fp8
from pallas_kernels.quantize import Fp4Weight, Fp8Weight
from pallas_kernels.sparse_attention import Fp8Rows

FORMS = ("auto", "reference", "xla", "tpu", "gpu")


def of(*shape: int, dtype: Any = jnp.float32) -> Any:
    # Not made by JAX: each shape would be a program.
    return jax.device_put(np.ones(shape, dtype))


KEYS = of(2, 2, 300, 64)
FP8_KEYS, FP4_KEYS = (
    jax.tree.map(lambda x: of(*x.shape, dtype=x.dtype), jax.eval_shape(to, KEYS))
    for to in (to_fp8, to_fp4)
)
PAGES = PagedKeys(of(2, 9, 20, 64), of(2, 15, dtype=jnp.int32))
INDEXER: dict[str, Any] = {
    "q_BTIJ": of(2, 3, 4, 64),
    "weights_BTI": of(2, 3, 4),
    "keys": KEYS,
    "layer": jnp.int32(1),
    "visible_BT": of(2, 3, dtype=jnp.int32),
    "k": 16,
}
FP8 = Fp8Weight(of(2, 4, 256, 128, dtype=jnp.float8_e4m3fn), of(2, 4, 2, 1))
FP4 = Fp4Weight(of(2, 4, 128, 128, dtype=jnp.uint8), of(2, 4, 8, 128, dtype=jnp.float8_e8m0fnu))
LORA = LoraWeight(of(2, 4, 128, 256), of(2, 4, 8, 256), of(2, 4, 128, 8), 0.5)
EXPERTS: dict[str, Any] = {
    "x_TD": of(5, 256),
    "expert_TA": of(5, 2, dtype=jnp.int32),
    "weight_TA": of(5, 2),
    "w1_LEFD": of(2, 4, 128, 256),
    "w3_LEFD": of(2, 4, 128, 256),
    "w2_LEDF": of(2, 4, 256, 128),
    "layer": jnp.int32(0),
    "limit": 2.0,
    "weight_first": True,
}
MATRIX = Fp8Weight(of(256, 128, dtype=jnp.float8_e4m3fn), of(2, 1))
NORM = {"eps": 1e-6, "norm_eps": 1e-6}
PRE = {"x_BTM": of(1, 3, 256), "fn_QM": of(8, 256), "base_Q": of(8), "scale_3": of(3)}
PRE |= NORM | {"streams": 2, "steps": 2}
POST = {"output_BTD": of(1, 3, 128), "x_BTM": of(1, 3, 256)}
POST |= {"post_BTN": of(1, 3, 2), "comb_BTNN": of(1, 3, 2, 2)}
HEADS = {"x_BTHK": of(1, 3, 2, 16), "cos_BTQ": of(1, 3, 4), "sin_BTQ": of(1, 3, 4)}
INTEGERS = of(2, 3, dtype=jnp.int32)
ATTENTION = {"q_BTHK": of(2, 3, 4, 512), "pool_LBSK": of(2, 2, 32, 512), "layer": jnp.int32(1)}
ATTENTION |= {"sink_H": of(4), "scale": 1.0}
RING = {"window_BRK": of(2, 8, 512), "window_mask_BTR": of(2, 3, 8, dtype=bool)}
CHUNK = {"window_BXK": of(2, 11, 512), "start_B": INTEGERS[:, 0], "window": 8}
WINDOWS = {"bias_MC": of(4, 256), "scale_K": of(128), "table": (of(2, 3, 16), of(2, 3, 16))}
WINDOWS |= {"overlap": 2, "eps": 1e-6, "rounding": "fp8", "dtype": jnp.float32}
PREFILL = {"rows_BTC": of(2, 11, 512), "before_BPC": of(2, 8, 512), "start_B": INTEGERS[:, 0]}
DECODE = {"ring_LBRC": of(2, 2, 16, 512), "layer": jnp.int32(1), "window_B": INTEGERS[:, 0]}
DECODE |= {"table": (of(2, 1, 16), of(2, 1, 16))}
POOL = {"kv_BXC": of(2, 12, 256), "gate_BXC": of(2, 12, 256), "first_B": INTEGERS[:, 0]}
POOL |= {"bias_MC": of(4, 256), "overlap": 2}
HEAD = {"x_BTM": of(1, 3, 256), "fn_NM": of(2, 256), "base_N": of(2), "scale_1": of(1), **NORM}


def changed(tree: Any, **parts: Any) -> Any:
    return dataclasses.replace(tree, **parts)


def refused(door: Any, args: dict[str, Any], wrong: dict[str, Any], error: Any, match: str) -> None:
    for impl in FORMS:
        with pytest.raises(error, match=match):
            # Under the annotations' check, which would refuse some of it first.
            inspect.unwrap(door)(**args | wrong, impl=impl)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"k": 0}, ValueError, "k is 0; it takes whole numbers from 1 on"),
        ({"k": -3}, ValueError, "k is -3"),
        ({"k": 2.0}, ValueError, r"k is 2\.0"),
        ({"visible_BT": of(2, 4, dtype=jnp.int32)}, ValueError, r"visible_BT .* \(B=2, T=3\)"),
        ({"visible_BT": of(2, dtype=jnp.int32)}, ValueError, r"visible_BT has shape \(2,\)"),
        ({"visible_BT": of(2, 3)}, TypeError, "visible_BT is float32; it takes signed integers"),
        ({"hidden_BT": of(3, 3, dtype=jnp.int32)}, ValueError, r"hidden_BT .* \(B=2, T=3\)"),
        ({"hidden_BT": of(2, 3)}, TypeError, "hidden_BT is float32; it takes signed integers"),
        ({"layer": of(1, dtype=jnp.int32)}, ValueError, r"layer has shape \(1,\), not \(\)"),
        ({"q_BTIJ": of(2, 3, 4, 64, dtype=jnp.int8)}, TypeError, "q_BTIJ is int8; .* floats"),
        ({"weights_BTI": of(2, 3, 3)}, ValueError, r"weights_BTI .*I=4\)"),
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
            r"keys\.codes is uint8; it takes float8_e4m3fn",
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
def test_of_the_indexer(wrong: dict[str, Any], error: Any, match: str) -> None:
    refused(indexer_topk.select, INDEXER, wrong, error, rf"^indexer_topk\.select: {match}")


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"x_TD": of(5, 128)}, ValueError, r"w1_LEFD .*D=128\)"),
        ({"x_TD": of(5, 256, dtype=jnp.int32)}, TypeError, "x_TD is int32"),
        ({"expert_TA": of(3, 2, dtype=jnp.int32)}, ValueError, r"expert_TA .* \(T=5, A\)"),
        ({"expert_TA": of(5, 2)}, TypeError, "expert_TA is float32"),
        ({"weight_TA": of(5, 1)}, ValueError, r"weight_TA .*A=2\)"),
        ({"w1_LEFD": of(4, 128, 256)}, ValueError, r"w1_LEFD .* \(L, E, F, D=256\)"),
        ({"w3_LEFD": of(2, 4, 64, 256)}, ValueError, r"w3_LEFD .*F=128"),
        ({"w2_LEDF": of(2, 3, 256, 128)}, ValueError, r"w2_LEDF .*E=4"),
        ({"w2_LEDF": of(2, 4, 128, 256)}, ValueError, r"w2_LEDF .*D=256, F=128"),
        ({"w1_LEFD": changed(FP8, scale=FP8.scale[:, :, :1])}, ValueError, r"w1_LEFD\.scale"),
        (
            {"w1_LEFD": changed(FP4, scale=FP4.scale.astype(jnp.float32))},
            TypeError,
            r"w1_LEFD\.scale is float32; it takes float8_e8m0fnu",
        ),
        ({"w3_LEFD": changed(LORA, a=LORA.a[:, :, :4])}, ValueError, r"w3_LEFD\.b_LENr .* r=4"),
        ({"w3_LEFD": changed(LORA, b=LORA.b[:, :, :64])}, ValueError, r"w3_LEFD\.b_LENr .*N=128"),
    ],
)
def test_of_the_experts(wrong: dict[str, Any], error: Any, match: str) -> None:
    door = grouped_matmul.expert_mlp
    refused(door, EXPERTS, wrong, error, rf"^grouped_matmul\.expert_mlp: {match}")


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"x": of(2, 128)}, ValueError, "x has 128 channels; .* take 256"),
        ({"x": of(2, 256, dtype=jnp.int32)}, TypeError, "x is int32"),
        ({"x": jnp.float32(1)}, ValueError, "x has no dims"),
        ({"w": of(3, 4, 256)}, ValueError, r"w stands for \(3, 4, 256\)"),
        ({"w": changed(MATRIX, scale=of(3, 1))}, ValueError, r"w\.scale has shape \(3, 1\)"),
        ({"w": changed(MATRIX, codes=of(256, 128))}, TypeError, r"w\.codes is float32"),
        ({"layer": 0.0}, TypeError, "layer is float32; it takes signed integers"),
        ({"layer": np.bool_(1)}, TypeError, "layer is bool"),
        ({"layer": of(1, dtype=jnp.int32)}, ValueError, r"layer has shape \(1,\), not \(\)"),
    ],
)
def test_of_a_matmul(wrong: dict[str, Any], error: Any, match: str) -> None:
    args = {"x": of(2, 256), "w": MATRIX}
    refused(quantize.linear, args, wrong, error, rf"^quantize\.linear: {match}")


@pytest.mark.parametrize("door", [quantize.fake_quant_fp8, quantize.fake_quant_fp4])
def test_of_a_rounding(door: Any) -> None:
    args = {"x": of(2, 64), "block": 32}
    for block in (0, -1, 2.0):
        refused(door, args, {"block": block}, ValueError, f"block is {block}")
    refused(door, args, {"x": of(2, 64, dtype=jnp.int32)}, TypeError, "x is int32")
    refused(door, args, {"x": np.float32(1)}, ValueError, "x has no dims")


@pytest.mark.parametrize(
    ("name", "wrong", "match"),
    [
        ("pre", {"fn_QM": of(7, 256)}, "fn_QM .*Q=8"),
        ("pre", {"base_Q": of(7)}, "base_Q .*Q=8"),
        ("pre", {"scale_3": of(1)}, r"scale_3 has shape \(1,\), not \(3\)"),
        ("pre", {"steps": 0}, "2 streams and 0 steps"),
        (
            "pre",
            {"x_BTM": of(1, 3, 255), "fn_QM": of(8, 255)},
            "x_BTM has 255 channels, not 2 equal",
        ),
        ("post", {"output_BTD": of(1, 3, 64)}, "output_BTD .*D=128"),
        ("post", {"comb_BTNN": of(1, 3, 2, 3)}, "comb_BTNN .*N=2, N=2"),
        ("head", {"base_N": of(3)}, "base_N .*N=2"),
    ],
)
def test_of_hyper_connections(name: str, wrong: dict[str, Any], match: str) -> None:
    args: Any = {"pre": PRE, "post": POST, "head": HEAD}[name]
    refused(getattr(hyper, name), args, wrong, ValueError, rf"^hyper\.{name}: {match}")


@pytest.mark.parametrize("op", [dense_attention, sparse_attention])
@pytest.mark.parametrize(
    ("name", "wrong", "error", "match"),
    [
        ("decode", {"q_BTHK": of(2, 3, 2048)}, ValueError, r"q_BTHK has shape \(2, 3, 2048\)"),
        ("decode", {"window_BRK": of(2, 8, 64)}, ValueError, r"window_BRK .* \(B=2, R, K=512\)"),
        (
            "decode",
            {"window_mask_BTR": of(2, 3, 8, dtype=jnp.int32)},
            TypeError,
            "window_mask_BTR is int32; it takes booleans",
        ),
        ("decode", {"window_mask_BTR": of(2, 3, 7, dtype=bool)}, ValueError, "window_mask_BTR"),
        ("decode", {"pool_LBSK": of(2, 32, 512)}, ValueError, "pool_LBSK has shape"),
        ("decode", {"pool_LBSK": of(2, 1, 32, 512)}, ValueError, "pool_LBSK .*B=2"),
        ("decode", {"layer": jnp.float32(1)}, TypeError, "layer is float32"),
        ("decode", {"sink_H": of(3)}, ValueError, r"sink_H has shape \(3,\), not \(H=4\)"),
        ("prefill", {"window_BXK": of(1, 11, 512)}, ValueError, "window_BXK .*B=2"),
        ("prefill", {"window_BXK": of(2, 12, 512)}, ValueError, "window_BXK has 12 keys"),
        ("prefill", {"start_B": of(2)}, TypeError, "start_B is float32; it takes signed integers"),
        ("prefill", {"start_B": INTEGERS}, ValueError, "start_B has shape"),
        ("prefill", {"layer": INTEGERS[0]}, ValueError, r"layer has shape \(3,\), not \(\)"),
    ],
)
def test_of_attention(op: Any, name: str, wrong: Any, error: Any, match: str) -> None:
    seen = (
        {"visible_BT": INTEGERS} if op is dense_attention else {"indices_BTk": INTEGERS[..., None]}
    )
    args: Any = ATTENTION | seen | (RING if name == "decode" else CHUNK)
    short = op.__name__.rpartition(".")[2]
    refused(getattr(op, name), args, wrong, error, rf"^{short}\.{name}: {match}")


def test_of_documents_that_share_a_row() -> None:
    dense: Any = ATTENTION | CHUNK | {"visible_BT": INTEGERS}
    sparse: Any = ATTENTION | CHUNK | {"indices_BTk": INTEGERS[..., None]}
    for run, args, name in (
        (dense_attention.prefill, dense, "first_BT"),
        (dense_attention.prefill, dense, "hidden_BT"),
        (sparse_attention.prefill, sparse, "first_BT"),
    ):
        refused(run, args, {name: INTEGERS[:, :2]}, ValueError, rf"prefill: {name} .*T=3\)")
        refused(run, args, {name: of(2, 3)}, TypeError, f"prefill: {name} is float32")


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_of_the_entries_attended_to(name: str) -> None:
    chunk: Any = ATTENTION | (RING if name == "decode" else CHUNK)
    dense, args = getattr(dense_attention, name), chunk | {"visible_BT": INTEGERS}
    refused(dense, args, {"visible_BT": INTEGERS[:, :2]}, ValueError, r"visible_BT .*T=3\)")
    refused(dense, args, {"visible_BT": of(2, 3)}, TypeError, "visible_BT is float32")
    sparse, args = getattr(sparse_attention, name), chunk | {"indices_BTk": INTEGERS[..., None]}
    data = of(2, 2, 32, 640, dtype=jnp.uint8)
    for wrong, error, match in (
        ({"indices_BTk": INTEGERS}, ValueError, r"indices_BTk has shape \(2, 3\)"),
        ({"indices_BTk": of(2, 3, 1)}, TypeError, "indices_BTk is float32"),
        ({"pool_LBSK": data}, TypeError, "pool_LBSK is uint8; it takes floats"),
        ({"pool_LBSK": Fp8Rows(data[..., :584])}, ValueError, r"pool_LBSK\.data_LBSW .*W=640"),
        ({"pool_LBSK": Fp8Rows(data[:, :1])}, ValueError, r"pool_LBSK\.data_LBSW .*B=2"),
        (
            {"pool_LBSK": Fp8Rows(data.view(jnp.int8))},
            TypeError,
            r"pool_LBSK\.data is int8; it takes uint8",
        ),
    ):
        refused(sparse, args, wrong, error, match)
    narrow: Any = {"q_BTHK": of(2, 3, 4, 64), "pool_LBSK": Fp8Rows(data)}
    narrow["window_BRK" if name == "decode" else "window_BXK"] = of(
        2, 8 + 3 * (name != "decode"), 64
    )
    refused(sparse, args, narrow, ValueError, r"pool_LBSK has shape \(2, 2, 32, 512\).*K=64")


@pytest.mark.parametrize(
    ("name", "wrong", "error", "match"),
    [
        ("prefill", {"overlap": 3}, ValueError, "overlap is 3; it takes 1 and 2"),
        ("prefill", {"rounding": "bf16"}, ValueError, "rounding is 'bf16'"),
        ("prefill", {"rows_BTC": of(2, 11, 256)}, ValueError, "rows_BTC .*C=512"),
        ("prefill", {"before_BPC": of(2, 4, 512)}, ValueError, "before_BPC .*P=8"),
        ("prefill", {"start_B": of(2)}, TypeError, "start_B is float32"),
        ("prefill", {"bias_MC": of(256)}, ValueError, "bias_MC has shape"),
        ("prefill", {"bias_MC": of(4, 255)}, ValueError, r"bias_MC .* \(M, 2 \* K\)"),
        ("prefill", {"scale_K": of(64)}, ValueError, "scale_K .*K=128"),
        ("prefill", {"table": (of(2, 2, 16),) * 2}, ValueError, r"table\[0\]_BnQ .*n=3"),
        ("prefill", {"table": (of(2, 3, 16), of(2, 3, 8))}, ValueError, r"table\[1\]_BnQ .*Q=16"),
        ("prefill", {"table": (of(2, 3, 65),) * 2}, ValueError, "scale_K has 128 channels; 65"),
        ("decode", {"ring_LBRC": of(2, 16, 512)}, ValueError, "ring_LBRC has shape"),
        (
            "decode",
            {"ring_LBRC": of(2, 2, 16, 512, dtype=jnp.int8)},
            TypeError,
            "ring_LBRC is int8",
        ),
        ("decode", {"layer": INTEGERS[0, :1]}, ValueError, r"layer has shape \(1,\)"),
        ("decode", {"window_B": of(2)}, TypeError, "window_B is float32"),
        ("decode", {"window_B": INTEGERS[0]}, ValueError, "window_B .*B=2"),
        ("decode", {"table": WINDOWS["table"]}, ValueError, r"table\[0\]_BnQ .*n=1"),
        ("pool", {"gate_BXC": of(2, 8, 256)}, ValueError, "gate_BXC .*X=12"),
        ("pool", {"bias_MC": of(4, 128)}, ValueError, "kv_BXC .*C=128"),
        ("pool", {"bias_MC": of(5, 256)}, ValueError, r"kv_BXC has 12 tokens, .* n \+ 1 .* of 5"),
        ("pool", {"first_B": of(2)}, TypeError, "first_B is float32"),
    ],
)
def test_of_compression(name: str, wrong: Any, error: Any, match: str) -> None:
    args: Any = {"prefill": WINDOWS | PREFILL, "decode": WINDOWS | DECODE, "pool": POOL}[name]
    refused(getattr(compress, name), args, wrong, error, rf"^compress\.{name}: {match}")


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"x_BTHK": of(1, 3, 16)}, ValueError, r"x_BTHK has shape \(1, 3, 16\)"),
        ({"x_BTHK": of(1, 3, 2, 16, dtype=jnp.int32)}, TypeError, "x_BTHK is int32"),
        ({"cos_BTQ": of(1, 2, 4)}, ValueError, "cos_BTQ .*T=3"),
        ({"sin_BTQ": of(1, 3, 5)}, ValueError, "sin_BTQ .*Q=4"),
        ({"x_BTHK": of(1, 3, 2, 6)}, ValueError, "x_BTHK has 6 channels; 4 pairs"),
    ],
)
def test_of_rotary(wrong: dict[str, Any], error: Any, match: str) -> None:
    refused(rotary.rotate, HEADS, wrong, error, rf"^rotary\.rotate: {match}")


@pytest.mark.parametrize("op", [dense_attention, sparse_attention, compress])
def test_a_layer_may_be_a_plain_number(op: Any) -> None:
    args = WINDOWS | DECODE if op is compress else ATTENTION | RING
    seen = {dense_attention: {"visible_BT": INTEGERS}, compress: {}}
    args |= seen.get(op, {"indices_BTk": INTEGERS[..., None]})
    run = inspect.unwrap(op.decode)
    np.testing.assert_array_equal(run(**args | {"layer": 1}), run(**args))
