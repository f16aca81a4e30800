"""The site builds offline, its links resolve, and the pages name what exists."""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify

import v4jax
from tests import house
from v4jax.__main__ import main
from v4jax.decoding.sampling import SamplingParams
from v4jax.language_model import LanguageModel
from v4jax_train.__main__ import main as train_main

ROOT = house.ROOT
DOCS = ROOT / "docs"
SOURCES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OPERATIONS = sorted(path.parent.name for path in (ROOT / "pallas_kernels").glob("*/__init__.py"))
FENCED = re.compile(r"^(```+)(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
relative = lambda file: file.relative_to(ROOT).as_posix()


class Page(HTMLParser):
    """A page of the site.

    Attributes:
      ids: of its elements.
      loaded: addresses of what a browser loads to show it.
      classes: of its elements.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loaded: set[str] = set()
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values["id"]} if "id" in values else set()
        self.classes |= set(values.get("class", "").split())
        if "src" in values:
            self.loaded.add(values["src"])
        if tag == "link" and values.get("rel") not in ("next", "prev", "canonical"):
            self.loaded.add(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; broken links and anchors between its pages end the build."""
    directory = tmp_path_factory.mktemp("docs")
    target = directory / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "TMPDIR": str(directory)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    files = {file.relative_to(site).as_posix(): file for file in site.rglob("*.html")}
    return {name: Page(file.read_text("utf-8")) for name, file in files.items()}


@pytest.fixture(scope="module")
def documented(pages: dict[str, Page]) -> set[str]:
    """Full names of the objects in the API reference."""
    return {name for path, page in pages.items() if path.startswith("api/") for name in page.ids}


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    assert {"index.html", "installation.html", "commands.html", "api/v4jax.html"} <= pages.keys()
    for name, page in pages.items():
        external = {address for address in page.loaded if re.match(r"\w+:|//", address)}
        assert not {address for address in external if not address.startswith("data:")}, name
        # The theme would load a script for these from elsewhere.
        assert not page.classes & {"mermaid", "arithmatex"}, name
    styles = [file.read_text("utf-8") for file in site.rglob("*.css")]
    assert styles
    for text in styles:
        assert not re.search(r"""(?:@import|url\()\s*["']?(?:\w+:)?//""", text)


@pytest.mark.slow
@pytest.mark.parametrize("name", v4jax.__all__)
def test_public_names_are_in_the_reference(name: str, documented: set[str]) -> None:
    value = getattr(v4jax, name)
    assert {f"v4jax.{name}", f"{value.__module__}.{value.__qualname__}"} & documented


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_in_the_reference(operation: str, documented: set[str]) -> None:
    module = importlib.import_module(f"pallas_kernels.{operation}")
    functions = {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and (value.__module__ == module.__name__ or name in getattr(module, "__all__", ()))
    }
    assert functions
    assert {f"{module.__name__}.{name}" for name in functions} <= documented


def requested() -> Iterator[str]:
    """Full names that pages ask mkdocstrings for."""
    for file in sorted((DOCS / "api").glob("*.md")):
        directives = re.findall(r"^::: ([\w.]+)\n((?: +.*\n)*)", file.read_text("utf-8"), re.M)
        for name, settings in directives:
            yield name
            members = re.search(r"members: \[([^\]]*)\]", settings)
            yield from (f"{name}.{member}" for member in members[1].split(", ")) if members else ()


@pytest.mark.slow
def test_requested_names_are_in_the_reference(documented: set[str]) -> None:
    names = set(requested())
    assert len(names) > 50
    assert names <= documented


@pytest.mark.slow
def test_every_command_is_on_its_page(pages: dict[str, Page]) -> None:
    wanted = {"v4jax", "v4jax-generate", "v4jax-merge", "v4jax-train", "v4jax-train-resume"}
    assert wanted <= pages["commands.html"].ids


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "`", FENCED.sub("", text))


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", file.read_text("utf-8")), re.MULTILINE)
    return {slugify(heading.replace("`", ""), "-") for heading in headings}


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_links_resolve(file: Path) -> None:
    for link in LINK.findall(without_code(file.read_text("utf-8"))):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", path):
            continue
        target = file.parent / path if path else file
        assert target.is_file(), link
        # Anchors of the reference exist in the site only; its build checks them.
        if anchor and target.parent.name != "api":
            assert anchor in anchors(target), link


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b` c\n[a](page.md#a-b-c)\n[b](missing.md)\n```\n# d\n[c](d)\n```\n")
    assert anchors(page) == {"a-b-c"}
    assert LINK.findall(without_code(page.read_text())) == ["page.md#a-b-c", "missing.md"]
    with pytest.raises(AssertionError):
        test_links_resolve(page)


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_named_files_exist(file: Path) -> None:
    """Files are named from the root, from v4jax/, or from the page's own folder."""
    text = FENCED.sub("", file.read_text("utf-8"))
    for name in re.findall(r"`([\w/.-]+\.(?:py|md|toml|ipynb|yml))`", text):
        known = (ROOT / name, ROOT / "v4jax" / name, ROOT / "benchmarks" / name, file.parent / name)
        assert any(path.exists() for path in known), name


def test_every_layer_is_on_the_page_of_the_architecture() -> None:
    page = (DOCS / "architecture.md").read_text("utf-8")
    folders = {value: key for key, value in house.PACKAGES.items()}
    tree = page.partition("```")[2].partition("```")[0]
    for layer in house.LAYERS:
        package, *inner = layer.split(".")
        name = f"{inner[0] if inner else folders[package]}/"
        assert re.search(rf"^ *{name} ", tree, re.MULTILINE), layer


def commands() -> Iterator[str]:
    """Command lines in blocks, fenced or indented, and within the text."""
    for file in SOURCES:
        text = file.read_text("utf-8")
        for block in (*(match[3] for match in FENCED.finditer(text)), text):
            indent = " {4}" if block is text else ""
            yield from re.findall(rf"^{indent}(v4jax(?:-train)? .*)$", block, re.MULTILINE)
        yield from re.findall(r"`(v4jax(?:-train)? [^`\n]*)`", text)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = command.partition("#")[0].split()
    run, default = (main, "") if program == "v4jax" else (train_main, "train")
    name = default if words[0].endswith(".toml") else words[0]
    if name != "COMMAND":
        with pytest.raises(SystemExit) as caught:
            run([name, "--help"])
        assert caught.value.code == 0
        options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert options <= {*re.findall(r"--?[a-z][\w.-]*", capsys.readouterr().out), "--help"}


def python_blocks() -> Iterator[tuple[Path, str]]:
    for file in SOURCES:
        for _, kind, block in FENCED.findall(file.read_text("utf-8")):
            if kind == "python":
                yield file, block


# Blocks of the README are run by `test_readme`.
@pytest.mark.parametrize(("file", "block"), list(python_blocks()))
def test_python_calls_what_exists(file: Path, block: str) -> None:
    objects = {"v4jax": v4jax, "model": LanguageModel}
    sampling = {field.name for field in dataclasses.fields(SamplingParams)}
    for node in ast.walk(ast.parse(block, file.name)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner in objects:
                signature = inspect.signature(getattr(objects[owner], node.func.attr))
                keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                bound = signature.bind(*[None] * (len(node.args) + (owner == "model")), **keywords)
                assert bound.arguments.get("sampling", {}).keys() <= sampling


def test_installation_names_the_extras_and_versions() -> None:
    page = (DOCS / "installation.md").read_text("utf-8")
    for extra in PROJECT["optional-dependencies"]:
        assert re.search(rf"^\|.*`{extra}`.*\|", page, re.MULTILINE), extra
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer" in page
    (jax,) = (line for line in PROJECT["dependencies"] if line.startswith("jax>"))
    assert f"jax {jax.removeprefix('jax>=')} or newer" in page
    for extra in ("tpu", "gpu"):
        (requirement,) = PROJECT["optional-dependencies"][extra]
        assert f"`{requirement}`" in page
