"""The torch code that the benchmarks time computes the same as our kernels."""

import jax
import numpy as np
import pytest

from benchmarks import kernels, torch_cases
from benchmarks.kernel_cases import Case, cases

SMALL = [
    case
    for case in cases(32)
    if case.name.startswith("flash")
    and torch_cases.form(case)
    and not case.name.endswith((" 4096 tokens", " 512 tokens"))
]


# XLA's plain emitters cannot round to FP4.
@pytest.mark.full_compilation
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}, {case.name}")
def test_torch_computes_the_same(case: Case) -> None:
    inputs = jax.jit(case.inputs)()
    run = torch_cases.form(case)
    assert run is not None
    actual = torch_cases.array(run(*torch_cases.tensors(inputs)))
    expected = np.asarray(jax.jit(lambda *args: case.run(*args, impl="reference"))(*inputs))
    assert actual.shape == expected.shape
    assert kernels.difference(actual, expected) <= kernels.TOLERANCE


def test_every_op_with_a_torch_form_is_covered() -> None:
    ops = {case.op for case in SMALL}
    assert ops == {
        "indexer_topk.select",
        "sparse_attention.decode",
        "sparse_attention.prefill",
        "quantize.linear",
        "grouped_matmul.expert_mlp",
    }
