"""A case of `test_parity` whose programs are compiled as users' are."""

from pathlib import Path

import pytest

from tests.test_parity import assert_logits_equal_transformers


@pytest.mark.full_compilation
def test_logits_equal_transformers_as_users_compile(tmp_path: Path) -> None:
    assert_logits_equal_transformers("two streams", tmp_path)
