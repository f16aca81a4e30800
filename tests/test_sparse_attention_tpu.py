"""TPU kernels of attention to listed entries: interpreted against the reference, and compiled.

Axis letters: as in test_sparse_attention.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import sparse_attention
from pallas_kernels.implementations import Unsupported
from pallas_kernels.sparse_attention import reference, rows, tpu, tpu_gather, tpu_prefill
from pallas_kernels.sparse_attention.inputs import DecodeInputs, PrefillInputs
from pallas_kernels.sparse_attention.shapes import SHAPES
from pallas_kernels.targets import Target, compiled, temporaries
from tests.kernels import interpreted
from tests.test_sparse_attention import listed, near, window_of

# float32 sums in a different order; bfloat16 weights are rounded relative to a different maximum:
# an ulp of weights near 1 and one of the output, whose values are below 4.
CLOSE: dict[Any, dict[str, Any]] = {
    jnp.float32: {"rtol": 1e-5, "atol": 2e-6},
    jnp.bfloat16: {"rtol": 2**-7, "atol": 2**-6},
}
SCALE, H, K = 0.1, 16, 128
TARGETS: tuple[Target, ...] = ("v5p", "v6e", "tpu7x")
Inputs = dict[str, Any]


class Words:
    """A reference to rows of narrow numbers, read as rows of 32-bit words with `packing` each."""

    def __init__(self, ref: Any) -> None:
        self.ref, self.packing = ref, 4 // ref.dtype.itemsize
        *stack, rows, lanes = ref.shape
        self.shape = (*stack, rows // self.packing, lanes)

    @property
    def at(self) -> "Words":
        return self

    def __getitem__(self, index: Any) -> Any:
        if index is ...:
            return self._values()
        index, rows = index if isinstance(index, tuple) else (index,), len(self.shape) - 2
        wide = lambda x: pl.ds(x.start * self.packing, x.size * self.packing)
        return Words(self.ref.at[tuple(wide(x) if i == rows else x for i, x in enumerate(index))])

    def _values(self) -> Any:
        bits = 32 // self.packing
        code = jax.lax.bitcast_convert_type(self.ref[...], f"uint{bits}").astype(jnp.uint32)
        *stack, rows, lanes = self.shape
        code = code.reshape(*stack, rows, self.packing, lanes)
        words = [code[..., i, :] << (bits * i) for i in range(self.packing)]
        return jax.lax.bitcast_convert_type(functools.reduce(jnp.bitwise_or, words), jnp.int32)


scratch_of_words = tpu_gather.Lists.scratch


class Lists(tpu_gather.Lists):
    """Lists in rows of their own dtype, which `Words` reads as words."""

    def __init__(self, ref: Any, sems: Any) -> None:
        super().__init__(Words(ref), sems)

    @staticmethod
    def scratch(k: int, pool: Any) -> Any:
        groups, rows, lanes = scratch_of_words(k, pool).shape
        return pltpu.VMEM((groups, rows * tpu_gather.packing(pool.dtype), lanes), pool.dtype)


def copy_of(source: Any, to: Any, sem: Any) -> Any:
    return pltpu.make_async_copy(source.ref, to.ref, sem)


@contextlib.contextmanager
def words_interpreted(**params: Any) -> Iterator[None]:
    """Like `interpreted`, which does not support references read as words of another width."""
    with (
        mock.patch.object(tpu_gather, "Lists", Lists),
        mock.patch.object(tpu_gather, "as_words", Words),
        mock.patch.object(tpu_gather, "copy_words", copy_of),
        interpreted(**params),
    ):
        yield


def garbled(inputs: Inputs, window: str, mask_BTX: Any) -> Inputs:
    """The inputs as JAX arrays, with NaN in every row that must not be read."""
    inputs[window][~np.asarray(mask_BTX).any(1)] = np.nan
    pool, indices_BTk = inputs["pool_LBSK"], inputs["indices_BTk"]
    pool[0] = np.nan
    for row, indices_Tk in enumerate(indices_BTk):
        pool[1, row, ~np.isin(np.arange(pool.shape[2]), indices_Tk)] = np.nan
    return {name: jnp.asarray(x) for name, x in inputs.items()}


def arrays(seed: int, B: int, T: int, X: int, S: int, k: int, dtype: Any, window: str) -> Inputs:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: np.array(jnp.asarray(rng.standard_normal(shape), dtype))
    return {
        "q_BTHK": normal(B, T, H, K),
        window: normal(B, X, K),
        "pool_LBSK": normal(2, B, S, K),
        "layer": np.int32(1),
        "indices_BTk": listed(seed, B, T, S, k),
        "sink_H": rng.standard_normal(H).astype(np.float32),
    }


def decode_inputs(
    B: int = 2,
    T: int = 3,
    R: int = 24,
    S: int = 64,
    k: int = 40,
    dtype: Any = jnp.bfloat16,
    seed: int = 0,
) -> Inputs:
    inputs = arrays(seed, B, T, R, S, k, dtype, "window_BRK")
    mask_BTR = np.random.default_rng(seed).random((B, T, R)) < 0.6
    return garbled(inputs | {"window_mask_BTR": mask_BTR}, "window_BRK", mask_BTR)


def prefill_inputs(
    starts: tuple[int, ...] = (0, 40),
    T: int = 5,
    window: int = 16,
    S: int = 64,
    k: int = 40,
    dtype: Any = jnp.bfloat16,
    seed: int = 0,
    last: bool = False,
) -> Inputs:
    """Random inputs; `last` puts the pool's last entry in every list."""
    inputs = arrays(seed, len(starts), T, window + T, S, k, dtype, "window_BXK")
    inputs["start_B"] = np.array(starts, np.int32)
    if last:
        indices_BTk = inputs["indices_BTk"]
        indices_BTk[indices_BTk == S - 1] = -1
        indices_BTk[..., 0] = S - 1
    return garbled(inputs, "window_BXK", near(inputs))


def run(form: Any, inputs: Inputs) -> np.ndarray:
    static = {"scale": SCALE}
    if "start_B" in inputs:
        static["window"] = window_of(inputs)
    function, record = form.decode, DecodeInputs
    if "start_B" in inputs:
        function, record = form.prefill, PrefillInputs
    out_BTHK = jax.jit(functools.partial(function, **static))(record(**inputs))
    return np.asarray(out_BTHK, np.float32)


def check(inputs: Inputs, **params: Any) -> None:
    dtype = inputs["q_BTHK"].dtype.type
    with words_interpreted(**params):
        out_BTHK = run(tpu, inputs)
    np.testing.assert_allclose(out_BTHK, run(reference, inputs), **CLOSE[dtype])


def test_decode_equals_the_reference_and_does_not_race() -> None:
    check(decode_inputs(B=2, T=2), detect_races=True, num_cores_or_threads=2)


def test_prefill_among_few_entries_equals_the_reference_and_does_not_race() -> None:
    # Two steps of entries, the second short; two blocks of queries, the second short.
    check(
        prefill_inputs((3,), T=18, S=1040, dtype=jnp.float32),
        detect_races=True,
        num_cores_or_threads=2,
    )


def test_prefill_among_many_entries_equals_the_reference_and_does_not_race() -> None:
    with mock.patch.object(tpu_prefill, "FEW", 1024):
        check(
            prefill_inputs((3, 40), T=1, S=1040, last=True),
            detect_races=True,
            num_cores_or_threads=2,
        )


def test_prefill_handles_each_block_as_its_list_requires() -> None:
    inputs = prefill_inputs((0,), T=17, S=1040)
    indices_BTk = np.full((1, 17, 8), -1, np.int32)
    indices_BTk[0, 3, 2], indices_BTk[0, 16, 5] = 1000, 1039
    pool_LBSK = np.ones(inputs["pool_LBSK"].shape, np.float32)
    inputs |= {
        "indices_BTk": jnp.asarray(indices_BTk),
        "pool_LBSK": jnp.asarray(pool_LBSK, jnp.bfloat16),
    }
    with mock.patch.object(tpu_prefill, "FEW", 1024):
        check(inputs)


@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 2**32 - 1), T=st.integers(1, 4), k=st.integers(1, 128))
def test_decode_on_random_data(seed: int, T: int, k: int) -> None:
    check(decode_inputs(B=1, T=T, R=8, k=k, dtype=jnp.float32, seed=seed))


def test_a_query_that_sees_nothing_outputs_zero() -> None:
    inputs = decode_inputs(B=1, T=2)
    inputs["window_mask_BTR"] = jnp.zeros((1, 2, 24), bool)
    inputs["indices_BTk"] = jnp.full((1, 2, 40), -1, jnp.int32)
    inputs["pool_LBSK"] = jnp.full_like(inputs["pool_LBSK"], jnp.nan)
    with words_interpreted():
        np.testing.assert_array_equal(run(tpu, inputs), 0.0)


def test_decode_of_fp8_rows_equals_the_reference() -> None:
    inputs = decode_inputs(B=1, T=2)
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    # Blocks from tiny to large, so that scales and subnormal codes matter.
    spread = jnp.asarray(2.0 ** rng.integers(-12, 3, (2, 1, 64, 512)), jnp.bfloat16)
    inputs |= {
        "q_BTHK": normal(1, 2, H, 512),
        "window_BRK": normal(1, 24, 512),
        "pool_LBSK": rows.encode(normal(2, 1, 64, 512) * spread),
    }
    check(inputs)


def structs(name: str, T: int, S: int, *, chunk: bool, fp8: bool = False) -> Inputs:
    shape, B, bf16 = SHAPES[name], 1 if chunk else 8, jnp.bfloat16
    array = lambda *dims, dtype=bf16: jax.ShapeDtypeStruct(dims, dtype)
    pool = array(2, B, S, shape.head_dim)
    inputs = {
        "q_BTHK": array(B, T, shape.heads, shape.head_dim),
        "pool_LBSK": rows.Fp8Rows(array(2, B, S, rows.WIDTH, dtype=jnp.uint8)) if fp8 else pool,
        "layer": array(dtype=jnp.int32),
        "indices_BTk": array(B, T, shape.k, dtype=jnp.int32),
        "sink_H": array(shape.heads, dtype=jnp.float32),
    }
    if chunk:
        window = array(B, shape.window + T, shape.head_dim)
        return inputs | {"window_BXK": window, "start_B": array(B, dtype=jnp.int32)}
    R = shape.window + 8
    mask = array(B, T, R, dtype=jnp.bool_)
    return inputs | {"window_BRK": array(B, R, shape.head_dim), "window_mask_BTR": mask}


def program(target: Target, function: Any, inputs: Inputs, **static: Any) -> Any:
    executable = compiled(target, lambda inputs: function(**inputs, scale=SCALE, **static), inputs)
    assert "tpu_custom_call" in (executable.as_text() or "")
    return executable


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "T", "fp8"), [("flash", 1, False), ("flash", 8, True), ("pro", 1, False)]
)
def test_decode_compiles_and_copies_no_pool(name: str, T: int, fp8: bool, target: Target) -> None:
    """A layer of the pool takes 2 GiB, the indices 0.1 MB."""
    inputs = structs(name, T, 262144, chunk=False, fp8=fp8)
    assert temporaries(program(target, sparse_attention.decode, inputs)) <= 4e5


@pytest.mark.full_compilation
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_prefill_compiles_within_32_megabytes(name: str, target: Target) -> None:
    inputs = structs(name, 4096, 262144, chunk=True)
    executable = program(target, sparse_attention.prefill, inputs, window=SHAPES[name].window)
    # The numbers of the rows to copy: 4096 x k.
    assert temporaries(executable) <= 4096 * SHAPES[name].k * 4 + 2e5 <= 32e6


@pytest.mark.parametrize(
    ("heads", "queries", "changed", "message"),
    [
        (16, 1, {"S": 65}, "capacity is a multiple of 8 entries"),
        (16, 9, {}, "up to 8 queries"),
        (3, 1, {}, "heads in multiples of 16"),
        (16, 1, {"window": jnp.float16}, "both in bfloat16 or both in float32"),
        (16, 1, {"pool": jnp.float16}, "a pool in the queries' dtype"),
    ],
)
def test_unsupported_inputs_are_rejected_while_tracing(
    heads: int, queries: int, changed: dict[str, Any], message: str
) -> None:
    array: Any = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    inputs = DecodeInputs(
        array(1, queries, heads, K),
        array(1, 24, K, dtype=changed.get("window", jnp.float32)),
        array(1, queries, 24, dtype=jnp.bool_),
        array(2, 1, changed.get("S", 64), K, dtype=changed.get("pool", jnp.float32)),
        array(dtype=jnp.int32),
        array(1, queries, 40, dtype=jnp.int32),
        array(heads),
    )
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(functools.partial(tpu.decode, scale=SCALE), inputs)
