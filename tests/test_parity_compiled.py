"""A case of `test_parity` whose programs are compiled as users' are."""

from pathlib import Path

from tests.test_parity import assert_logits_equal_transformers


def test_logits_equal_transformers_as_users_compile(tmp_path: Path) -> None:
    assert_logits_equal_transformers("two streams", tmp_path)
