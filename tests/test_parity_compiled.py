"""A case of `test_parity` whose programs are compiled as for users."""

from pathlib import Path

import pytest

from tests.test_parity import assert_logits_equal_transformers


@pytest.mark.full_compilation
def test_logits_equal_transformers_when_compiled_as_for_users(tmp_path: Path) -> None:
    assert_logits_equal_transformers("two streams", tmp_path)
