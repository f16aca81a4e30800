"""What mkdocs.yml cannot say: pages made of other files, and where griffe finds the packages.

Links to files outside docs/ become links to their copies in the site.
"""

import atexit
import contextlib
import io
import os
import posixpath
import re
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Pages whose text is a file of the repository.
PAGES = {
    "index.md": ROOT / "README.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "pallas_kernels.md": ROOT / "pallas_kernels" / "README.md",
}
COMMANDS = "commands.md"
_COPIES = "files"  # folder of the site
_LINK = re.compile(r"(?<=\]\()[\w./-]+(?=(?:#[^)\s]*)?\))")
_COMMAND = re.compile(r"^ {4}([a-z][\w-]*)(?= {2}|$)", re.MULTILINE)
_SECTION = re.compile(
    r"(?<=\S)\n(?=(?:Args|Attributes|Raises|Returns|Yields):(?: .*)?$)", re.MULTILINE
)


class Sections(griffe.Extension):
    """Puts a blank line before each section of a docstring, which griffe requires."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that griffe has read."""
        if obj.docstring:
            obj.docstring.value = _SECTION.sub("\n\n", obj.docstring.value)


@event_priority(100)
def on_config(config: MkDocsConfig) -> None:
    """Show griffe the packages under their import names, before its handler starts."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages, folders = (project["tool"]["setuptools"][key] for key in ("packages", "package-dir"))
    links = tempfile.TemporaryDirectory(prefix="v4jax-docs-")
    atexit.register(links.cleanup)
    for name in (name for name in packages if "." not in name):
        Path(links.name, name).symlink_to(ROOT / folders.get(name, name))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [links.name]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages, and copies of linked files."""
    add = lambda uri, **source: files.append(File.generated(config, uri, **source))
    for uri, source in PAGES.items():
        add(uri, content=source.read_text("utf-8"))
    add(COMMANDS, content=commands_page())
    for page in files.documentation_pages():
        for link in _LINK.findall(page.content_string):
            uri = _uri(page.src_uri, link)
            if uri and uri.startswith(_COPIES) and uri not in files.src_uris:
                add(uri, abs_src_path=str(ROOT / Path(uri).relative_to(_COPIES)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links within the site."""
    here = page.file.src_uri

    def translated(link: re.Match[str]) -> str:
        uri = _uri(here, link[0])
        return posixpath.relpath(uri, posixpath.dirname(here)) if uri else link[0]

    return _LINK.sub(translated, markdown)


def _uri(page: str, link: str) -> str | None:
    """What a page's link is in the site; None if there is no such file."""
    target = Path(os.path.normpath(PAGES.get(page, DOCS / page).parent / link))
    if not target.is_file():
        return None
    for uri, source in PAGES.items():
        if target == source:
            return uri
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    return f"{_COPIES}/{target.relative_to(ROOT).as_posix()}"


def commands_page() -> str:
    """The help texts of both programs and of all their commands."""
    from v4jax.__main__ import main as v4jax
    from v4jax_train.__main__ import main as v4jax_train

    os.environ["COLUMNS"] = "82"
    parts = ["# Command line\n\nWhat `--help` prints.\n"]
    for name, main in {"v4jax": v4jax, "v4jax-train": v4jax_train}.items():
        text = help_text(main)
        parts.append(f"## {name}\n\n```text\n{text}```\n")
        for command in _COMMAND.findall(text):
            parts.append(f"### {name} {command}\n\n```text\n{help_text(main, command)}```\n")
    return "\n".join(parts)


def help_text(main: Callable[[list[str]], int], *words: str) -> str:
    """What a program prints for `--help`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return printed.getvalue()
