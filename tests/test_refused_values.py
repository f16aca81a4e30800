"""Arbitrary values for each argument of each operation: refused by name, no array is printed."""

import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_kernels
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
from pallas_kernels.grouped_matmul import LayerWeight, LoraWeight
from pallas_kernels.indexer_topk import Fp4Keys, Fp8Keys
from pallas_kernels.paged import Paged
from pallas_kernels.quantize import Fp4Weight, Fp8Weight
from pallas_kernels.sparse_attention import Fp8Rows
from tests import test_refusals as cases

PACKAGE = Path(pallas_kernels.__file__).parent
VALUES: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "2.5": 2.5,
    "text": "x",
    "list": [1.0, 2.0],
    "arrays": [jnp.ones(3), jnp.ones(3)],
    "dict": {},
    "object": object(),
    "class": np.float32,
    "strings": np.array(["x", "y"]),
    "seven dims": np.ones((1,) * 7, np.float32),
    "empty": jnp.zeros(0),
    "weight": cases.MATRIX,
    "holds lists": Fp8Weight([1.0], [1.0]),
    "holds text": Fp4Weight("x", "y"),
    "short": Fp8Weight(jnp.zeros(3, jnp.float8_e4m3fn), jnp.ones(1)),
    "keys": Fp8Keys([1.0], jnp.ones(3)),
    "narrow keys": Fp4Keys(jnp.zeros(3, jnp.uint8), jnp.ones(3, jnp.float8_e8m0fnu)),
    "pages": Paged([1.0], None),
    "rows": Fp8Rows([1.0]),
    "update": LoraWeight(jnp.ones(3), [1.0], None, 1.0),
    "layer's": LayerWeight([1.0], [1.0]),
}
# Settings take numbers; optional arguments take None; a matmul takes a weight.
ACCEPTED = {
    **{name: {"-1", "2.5"} for name in ("scale", "eps", "norm_eps", "limit", "amax_floor")},
    **{name: {"None"} for name in ("hidden_BT", "first_BT", "norm")},
    "layer": {"-1"},
    "weight_first": {"True"},
}
DENSE = {"visible_BT": cases.INTEGERS}
SPARSE = {"indices_BTk": cases.INTEGERS[..., None]}
OPERATIONS: dict[str, tuple[Any, dict[str, Any], dict[str, set[str]]]] = {
    "indexer_topk.select": (indexer_topk.select, cases.INDEXER | {"hidden_BT": None}, {}),
    "indexer_topk.scores": (
        indexer_topk.scores,
        {"q_BTIJ": cases.ones(2, 3, 4, 64), "weights_BTI": cases.ones(2, 3, 4)}
        | {"keys_BSJ": cases.ones(2, 5, 64)},
        {},
    ),
    "grouped_matmul.expert_mlp": (grouped_matmul.expert_mlp, cases.EXPERTS, {}),
    "quantize.linear": (
        quantize.linear,
        {"x": cases.ones(2, 256), "w": cases.MATRIX, "layer": None, "groups": 1},
        {"layer": {"None"}, "w": {"weight"}, "groups": set()},
    ),
    "quantize.fake_quant_fp8": (
        quantize.fake_quant_fp8,
        {"x": cases.ones(2, 64), "block": 32, "amax_floor": 1e-4},
        {"x": {"seven dims", "empty"}},
    ),
    "quantize.fake_quant_fp4": (
        quantize.fake_quant_fp4,
        {"x": cases.ones(2, 64), "block": 32},
        {"x": {"seven dims", "empty"}},
    ),
    "quantize.hadamard": (quantize.hadamard, {"x": cases.ones(2, 64)}, {"x": {"seven dims"}}),
    "hyper.pre": (hyper.pre, cases.PRE, {}),
    "hyper.post": (hyper.post, cases.POST, {}),
    "hyper.head": (hyper.head, cases.HEAD, {}),
    "rotary.rotate": (rotary.rotate, cases.HEADS | {"norm": None}, {}),
    "dense_attention.decode": (
        dense_attention.decode,
        cases.ATTENTION | cases.RING | DENSE,
        {"pool_LBSK": {"None"}},
    ),
    "dense_attention.prefill": (
        dense_attention.prefill,
        cases.ATTENTION | cases.CHUNK | DENSE | {"first_BT": None, "hidden_BT": None},
        {"pool_LBSK": {"None"}},
    ),
    "sparse_attention.decode": (
        sparse_attention.decode,
        cases.ATTENTION | cases.RING | SPARSE,
        {},
    ),
    "sparse_attention.prefill": (
        sparse_attention.prefill,
        cases.ATTENTION | cases.CHUNK | SPARSE | {"first_BT": None},
        {},
    ),
    "compress.prefill": (compress.prefill, cases.WINDOWS | cases.PREFILL, {}),
    "compress.decode": (compress.decode, cases.WINDOWS | cases.DECODE, {}),
    "compress.pool": (compress.pool, cases.POOL, {}),
}


@pytest.fixture(autouse=True)
def as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the annotation checks, which only tests have."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def fault(op: str, function: Any, args: dict[str, Any], accepted: bool) -> str:
    """What is wrong with the outcome: a refusal must begin with the operation and be ours."""
    try:
        # Traced, not run.
        jax.eval_shape(lambda: function(**args, impl="xla"))
    except (TypeError, ValueError, NotImplementedError) as error:
        message, where = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
        ours = Path(where).is_relative_to(PACKAGE) and message.startswith(op)
        printed = any(part in message for part in ("Array", "array(", "[1."))
        return f"{error!r} of {where}" if accepted or printed or not ours else ""
    return "" if accepted else "is accepted"


def test_values_are_accepted_or_refused_by_name() -> None:
    faults = [
        f"{op}({name}={what}): {problem}"
        for op, (function, args, accepted) in OPERATIONS.items()
        for name in args
        if name != "dtype"
        for what, value in VALUES.items()
        if (
            problem := fault(
                op, function, args | {name: value}, what in (ACCEPTED | accepted).get(name, ())
            )
        )
    ]
    assert not faults, "\n".join(faults)


def test_unknown_forms_are_refused() -> None:
    for op, (function, args, _) in OPERATIONS.items():
        for value in (None, ["tpu"], 5, "mosaic"):
            try:
                function(**args, impl=value)
            except NotImplementedError as error:
                assert str(error).startswith(f"{op} has no ")  # noqa: PT017
            else:
                raise AssertionError(f"{op} accepts impl={value}")
