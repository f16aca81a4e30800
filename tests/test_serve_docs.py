"""The page on the server names all that it has, and nothing else."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.routing import Route

from tests.house import ROOT
from v4jax.engine.engine import Stats
from v4jax_serve import __main__ as command
from v4jax_serve import anthropic, app, chat_request, completions, information, responses
from v4jax_serve.conversation import EFFORTS
from v4jax_serve.metrics import Metrics

PAGE = (ROOT / "docs" / "serve.md").read_text("utf-8")
ROWS = [
    [cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| (.*) \|$", PAGE, re.M)
]
CODE = set(re.findall(r"`([^`\n]+)`", PAGE))


def test_every_option_is_there_with_its_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    options = dict(re.findall(r"^  (?:-h, )?(--[\w-]+)(.*(?:\n {8,}.*)*)", text, re.MULTILINE))
    rows = {row[0].strip("`").split()[0]: row[-1] for row in ROWS if row[0].startswith("`--")}
    assert rows.keys() == options.keys()
    for flag, description in options.items():
        if default := re.search(r"\(default: ([\w.]+)", description):
            assert default[1] in rows[flag], flag
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) == rows.keys()


def test_every_endpoint_is_there_with_its_method() -> None:
    endpoints = {
        f"{'POST' if 'POST' in (route.methods or ()) else 'GET'} {route.path}".replace(":path", "")
        for route in app.ROUTES
        if isinstance(route, Route)
    }
    assert len(endpoints) == len(app.ROUTES)
    rows = {name for row in ROWS for name in re.findall(r"`((?:GET|POST) /[^`]*)`", row[0])}
    assert rows == endpoints
    paths = {endpoint.split()[1] for endpoint in endpoints}
    assert {code for code in CODE if code.startswith("/")} <= paths


def test_every_metric_is_there() -> None:
    text = Metrics("name", Stats).text().decode()
    names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    names = {name for name in names if not name.endswith("_created")}
    rows = {row[0].strip("`") for row in ROWS if re.match(r"`(vllm|v4jax):", row[0])}
    assert rows == names
    assert {code for code in CODE if re.match("(vllm|v4jax):", code)} == names


def test_every_effort_is_there() -> None:
    table = {row[0].strip("`"): row[1:] for row in ROWS if row[1:2] in (["high"], ["max"])}
    april, last = (EFFORTS[revision] for revision in ("april", "0731"))
    assert table == {name or "none given": [april[name], last[name]] for name in april}


BODIES = (
    *(chat_request.BODY, completions.BODY, anthropic.BODY, responses.BODY),
    *(information.TOKENIZE_BODY, information.DETOKENIZE_BODY),
)


def fields(schema: Any) -> Iterator[str]:
    """Names of the fields in a JSON schema, at any depth."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            yield from fields(inner)


def test_every_field_is_there() -> None:
    names = {name for body in BODIES for name in fields(body.schema)}
    assert {"messages", "budget_tokens", "prompt", "stop_sequences", "input_schema"} <= names
    words = {word for code in CODE for word in re.split(r"\W+", code)}
    assert names <= words, names - words
