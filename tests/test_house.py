"""The rules of the source code hold, and violations are found."""

from pathlib import Path

import pytest

from tests import house
from tests.house import Module

KNOWN = house.modules()
GRAPH = {name: house.imports(module, KNOWN) for name, module in KNOWN.items()}


def test_layers_import_only_what_they_may() -> None:
    assert all(any(module.layer == layer for module in KNOWN.values()) for layer in house.LAYERS)
    assert not house.forbidden_imports(KNOWN)


def test_no_import_cycles() -> None:
    assert not house.import_cycles(GRAPH)


def test_files_functions_and_signatures_are_short() -> None:
    assert not house.long_files(KNOWN)
    assert not house.long_functions(KNOWN)
    assert not house.long_signatures(KNOWN)


def test_packages_within_v4jax_and_training_are_only_a_docstring() -> None:
    layers = {name for name in house.LAYERS if name.count(".") == 1}
    assert {name for name in layers if len(KNOWN[name].tree.body) > 1} == set()


def write(root: Path, **texts: str) -> dict[str, Module]:
    """A small source tree: `model__cache` is v4jax/model/cache.py."""
    for name, text in texts.items():
        file = root / "v4jax" / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return house.modules(root)


@pytest.mark.parametrize(
    "line",
    [
        "from v4jax.text import chat",
        "from v4jax.text.chat import ROLE",
        "import v4jax.text.chat",
        "def later():\n    from v4jax.text import chat",
        "from ..text import chat",
        "from ..text.chat import ROLE",
    ],
)
def test_a_forbidden_import_is_found(line: str, tmp_path: Path) -> None:
    known = write(tmp_path, text__chat="ROLE = 1", model__cache=line, arguments="")
    assert house.forbidden_imports(known) == ["v4jax.model.cache imports v4jax.text.chat"]


def test_every_layer_may_import_the_argument_checks(tmp_path: Path) -> None:
    known = write(tmp_path, arguments="", facts="", text__chat="from v4jax import arguments, facts")
    assert house.forbidden_imports(known) == ["v4jax.text.chat imports v4jax.facts"]


def test_an_import_cycle_is_found(tmp_path: Path) -> None:
    lines = {"a": "from v4jax import b", "b": "from v4jax import c", "c": "import v4jax.a", "d": ""}
    known = write(tmp_path, **{f"{k}": v for k, v in lines.items()})
    graph = {name: house.imports(module, known) for name, module in known.items()}
    assert house.import_cycles(graph) == [["v4jax.a", "v4jax.b", "v4jax.c"]]


def test_long_files_functions_and_signatures_are_found(tmp_path: Path) -> None:
    parameters = "self, a, b, c, d, e, f"
    known = write(
        tmp_path,
        right=f"def f({parameters}, x_ref, *, g):\n" + "    1\n" * 59,
        wrong=f"def f({parameters}, g):\n" + "    1\n" * 60,
        long="1\n" * 401,
    )
    assert house.long_files(known) == ["v4jax.long: 401 lines"]
    assert house.long_functions(known) == ["v4jax.wrong.f: 61 lines"]
    assert house.long_signatures(known) == ["v4jax.wrong.f: 7 positional parameters"]
