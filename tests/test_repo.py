"""Rules of the repository that no tool checks."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import house
from v4jax import presets
from v4jax.model.config import ModelConfig

ROOT = house.ROOT
SOURCES = list(house.files().values())
# Only commands print, and of the libraries' modules only these.
PRINTING = {ROOT / "v4jax" / name for name in ("__main__.py", "waiting.py")}
PRINTING |= {
    ROOT / "v4jax" / "commands" / name
    for name in ("chat.py", "command_line.py", "demo.py", "generate.py", "inspect.py", "launch.py")
}
PRINTING |= {ROOT / "train" / name for name in ("__main__.py", "display.py")}
# A package must not import the layers above it.
FORBIDDEN = {
    "pallas_kernels": {
        "v4jax",
        "v4jax_train",
        "flax",
        "tests",
        "benchmarks",
        "torch",
        "transformers",
    },
    "v4jax": {
        "v4jax_train",
        "optax",
        "grain",
        "tests",
        "benchmarks",
        "torch",
        "transformers",
        "safetensors",
        "pytest",
    },
    "train": {"tests", "benchmarks", "torch", "transformers", "safetensors", "pytest"},
    "benchmarks": {"tests"},
}
TEXT = {".py", ".md", ".toml", ".json", ".ipynb", ".yaml", ".txt", ""}
relative = lambda file: str(file.relative_to(ROOT))


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = (ROOT / name for name in listed.stdout.splitlines())
    return sorted(file for file in files if file.is_file() and file.suffix in TEXT)


def imports(file: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            packages.add(node.module.split(".")[0])
    return packages


def private_names(file: Path) -> set[str]:
    """Names with a leading underscore that a file uses from other libraries, anywhere in it."""
    tree = ast.parse(file.read_text())
    ours = {*FORBIDDEN, "v4jax_train", "tests", *sys.stdlib_module_names}
    modules: dict[str, str] = {}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            modules |= {
                alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= set(full.values())
            modules |= {alias.asname or alias.name: full[alias.name] for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in modules:
                names.add(f"{modules[first]}.{rest}")
    private = re.compile(r"(?:^|\.)_(?!_)")
    return {name for name in names if name.split(".")[0] not in ours and private.search(name)}


@pytest.mark.parametrize(
    "line",
    [
        "import jax._src.core",
        "from jax._src import core",
        "from jax import _src",
        "import jax; jax._src.core",
        "import orbax.checkpoint as ocp; ocp.utils._name",
        "from transformers import AutoModel; AutoModel._from_config()",
    ],
)
def test_private_names_are_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(line)
    assert private_names(tmp_path / "file.py")


def test_no_private_name_of_another_library_is_used() -> None:
    files = [file for file in tracked() if file.suffix == ".py"]
    assert len(files) > 200
    private = {relative(file): private_names(file) for file in files}
    assert not {file: names for file, names in private.items() if names}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_downwards_only(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {relative(file): imports(file) & FORBIDDEN[package] for file in files}
    assert not {file: names for file, names in wrong.items() if names}


def test_packages_import_only_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    renamed = {"orbax-checkpoint": "orbax", "pyyaml": "yaml"}
    module = lambda name: renamed.get(name, name.replace("-", "_"))
    names = lambda lines: {module(re.split(r"[<>=]", line)[0]) for line in lines}
    declared = names(project["dependencies"])
    extra = project["optional-dependencies"]
    training = declared | names(extra["train"]) | names(extra["tensorboard"])
    serving = declared | names(extra["serve"])
    # The engine's grammars need what the server does, pictures of plans what training does, URLs
    # an extra of their own.
    optional = {"llguidance", "matplotlib", "fsspec"}
    allowed = {"train": training, "serve": serving, "v4jax": declared | optional}
    for package in house.PACKAGES:
        used = set().union(*(imports(f) for f in SOURCES if f.is_relative_to(ROOT / package)))
        packages = {*house.PACKAGES, *house.PACKAGES.values()}
        assert used - sys.stdlib_module_names - packages <= allowed.get(package, declared)


def test_libraries_print_nothing() -> None:
    prints = [
        f"{relative(file)}:{node.lineno}"
        for file in SOURCES
        if file not in PRINTING
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not prints


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_loads(name: str) -> None:
    assert isinstance(presets.get(name), ModelConfig)


def test_text_is_ascii() -> None:
    data = {ROOT / "tests" / "data", ROOT / "v4jax" / "data"}
    non_ascii = [
        f"{relative(file)}:{number}"
        for file in tracked()
        if not data & set(file.parents)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if not line.isascii()
    ]
    assert not non_ascii


def test_no_path_of_a_developers_machine_is_written_down() -> None:
    absolute_path = re.compile(r"(?<![\w.])/(?:home|Users|root|work|mnt|opt)/\w")
    lines = [
        f"{relative(file)}:{number}"
        for file in tracked()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if absolute_path.search(line)
    ]
    assert not lines


def test_nothing_is_left_for_later() -> None:
    words = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
    files = [relative(file) for file in tracked() if words.search(file.read_text(encoding="utf-8"))]
    assert not files
