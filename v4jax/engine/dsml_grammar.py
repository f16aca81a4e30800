"""Grammars of tool calls in DSML, in llguidance's dialect of Lark.

`block_grammar` describes the calls that `v4jax.text.chat` writes for declared functions. It knows
values by the rules of JSON only, so a text has to satisfy a filter too, which keeps values to what
`v4jax.text.chat_parser` reads back unchanged: none contains a mark that the parser would obey, and
numbers fit a float.
"""

import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance

from v4jax.text.chat import DSML, END_THINK, EOS

# A block is held to its grammar from here on; `OPENING` is how the answer comes to it.
TRIGGER = f"<{DSML}"
OPENING = f"\n\n{TRIGGER}"
# A rule's 64-bit state has a bit for each parameter, and one for all undeclared ones.
MAX_PARAMETERS = 63

_CLOSE_CALLS = f"\n</{DSML}tool_calls>"
_OPEN_CALL, _CLOSE_CALL = f'\n<{DSML}invoke name="', f"\n</{DSML}invoke>"
_OPEN_PARAMETER, _CLOSE_PARAMETER = f'\n<{DSML}parameter name="', f"</{DSML}parameter>"
_IS_STRING = '" string="'
_ROOT_REFUSED = {"$ref", "allOf", "anyOf", "oneOf", "const", "enum"}
_ROOT_REFUSED |= {"patternProperties", "minProperties", "maxProperties"}
_KINDS = {"string", "other"}
_NOT_STRING = {"type": ["array", "boolean", "null", "number", "object"]}

_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_GROUP = "[0-9a-fA-F]{1,4}"
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_DATE = (
    "[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    "|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_MINUTES = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_MINUTES}:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_MINUTES})"
_URI = r"([a-zA-Z0-9_.~:\/?@!$&'()*+,;=-]|%[0-9a-fA-F]{2})"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "email": rf"[a-zA-Z0-9_+-]+(\.[a-zA-Z0-9_+-]+)*@{_LABEL}(\.{_LABEL})+",
    "hostname": rf"{_LABEL}(\.{_LABEL})*",
    "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
    "ipv6": "|".join(
        [f"({_GROUP}:){{7}}{_GROUP}", f"({_GROUP}:){{1,7}}:", f":(:{_GROUP}){{1,7}}", "::"]
        + [f"({_GROUP}:){{1,{n}}}(:{_GROUP}){{1,{7 - n}}}" for n in range(1, 7)]
    ),
    "uri": f"[a-zA-Z][a-zA-Z0-9+.-]*:{_URI}+(#{_URI}*)?",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}


def _literal(text: str) -> str:
    """A text as a terminal."""
    return json.dumps(text).replace("\x7f", "\\u007f")


def _without(characters: str, *marks: str) -> str:
    """A terminal of text that has none of the marks.

    Marks begin with "<" and have no other "<", and `characters` do not match "<". So after most
    characters the lexer's state is a plain repetition, whose mask llguidance has at hand.
    """
    rests = " | ".join(_literal(mark[1:]) for mark in marks)
    return f'{characters} ("<" ({characters} & ~(({rests}) /(?s:.*)/)))*'


def _json_terminals(*marks: str) -> str:
    """`JSON`, a superset of JSON texts, whose strings have none of the marks."""
    return rf"""
NUMBER: /[0-9]{{1,100}}(\.[0-9]{{1,100}})?([eE](-[0-9]{{1,3}}|\+?[0-9]{{1,2}}))?/
CHARACTERS: /([^<"\\\x00-\x1f]|\\["\\\/bfnrtu])*/
STRING: "\"" {_without("CHARACTERS", *marks)} "\""
JSON: (NUMBER? (/[\[\]{{}}:, \t\r\n\-]/ | "true" | "false" | "null" | STRING))* NUMBER?
"""


_TEXT_TERMINALS = f"""
TEXT: {_without("/[^<]*/", _CLOSE_PARAMETER[:-1], EOS)}
TEXT_VALUE: TEXT {_literal(_CLOSE_PARAMETER)}
"""
# What may be in an answer of JSON, and in a block.
ANSWER_FILTER = f"start: JSON | {_literal(OPENING)}\n{_json_terminals(END_THINK, EOS, TRIGGER)}"
BLOCK_FILTER = rf"""
start: (PARAMETER ("true\">" TEXT_VALUE | "false\">" JSON_VALUE))* TAGS
PARAMETER: TAGS "\"" /[^"]*/ {_literal(_IS_STRING)}
TAGS: /([^"]*"[^"]*">)*[^"]*/
JSON_VALUE: JSON {_literal(_CLOSE_PARAMETER)}
{_TEXT_TERMINALS}
{_json_terminals(_CLOSE_PARAMETER[:-1], EOS)}"""


def json_grammar(schema: Mapping[str, Any]) -> str:
    """JSON of a schema, in a rule; runs of blanks, which models may fall into, are short."""
    return "%json " + json.dumps(
        {**schema, "x-guidance": {"whitespace_pattern": "[ \\t\\r\\n]{1,64}"}}
    )


def block_grammar(tools: Sequence[Mapping[str, Any]], *, once: bool) -> str:
    """Calls of the tools, from behind `TRIGGER` on; a single one if `once`.

    A strict tool's call has declared parameters only, in any order, all that are required, and
    values of their schemas; llguidance must have accepted its parameters' schema. Any other call
    has any parameters, but none of the declared ones twice.

    Raises:
      ValueError: a tool that DSML or this grammar cannot express; the error names it.
    """
    rules = []
    for i, tool in enumerate(tools):
        try:
            rules += _call_rules(i, tool)
        except ValueError as error:
            raise ValueError(f"Tool {tool['name']!r} {error}") from None
        except RecursionError:
            raise ValueError(f"Tool {tool['name']!r} has a $ref that leads to itself.") from None
    more = "" if once else f"({_literal(_OPEN_CALL)} call)*"
    close = _literal(_CLOSE_PARAMETER)
    return "\n".join(
        [
            f"start: {_literal(f'tool_calls>{_OPEN_CALL}')} call {more} {_literal(_CLOSE_CALLS)}",
            f"call: {' | '.join(f'call{i}' for i in range(len(tools)))}",
            f'value: "true\\">" TEXT_VALUE | "false\\">" {json_grammar({})} {close}',
            _TEXT_TERMINALS,
            *rules,
        ]
    )


def _call_rules(index: int, tool: Mapping[str, Any]) -> list[str]:
    """The rules of a tool's call, from its name on.

    Args:
      index: tells the names of the rules from other tools'.
      tool: `name`, `parameters` and `strict`.
    """
    root, strict = tool.get("parameters") or {}, tool.get("strict")
    properties = root.get("properties", {})
    names, required, rules = [*properties], [], []
    if strict:
        _check_root(root)
        required = [name for name in names if name in root.get("required", ())]
        names.sort(key=lambda name: name not in required)
    for name in (tool["name"], *names):
        if mark := re.search(f'["\n\ud800-\udfff]|{DSML}|{EOS}', name):
            raise ValueError(f"has {mark[0]!r} in the name {name!r}, which DSML cannot express.")

    is_complete = f"is_ones([0:{len(required)}])" if required else "ne(_, 0)"
    rest = [f"{_literal(_CLOSE_CALL)} %if {is_complete}"]
    for bit, name in enumerate(names[:MAX_PARAMETERS]):
        value = f"value{index}x{bit}" if strict else "value"
        if strict:
            rules += _value_rules(value, properties[name], root)
        parameter = f"{_literal(_OPEN_PARAMETER)} {_literal(name + _IS_STRING)} {value}"
        rest.append(f"{parameter} rest{index}::set_bit({bit}) %if bit_clear({bit})")
    if not strict:
        declared = " | ".join(map(_literal, ["", *names[:MAX_PARAMETERS]]))
        other = f'(/[^"<\\n\\u{{ff5c}}]+/ & ~({declared})) {_literal(_IS_STRING)}'
        rules.append(f"OTHER{index}: {other}")
        parameter = f"{_literal(_OPEN_PARAMETER)} OTHER{index} value"
        rest.append(f"{parameter} rest{index}::set_bit({MAX_PARAMETERS})")
    none = "" if required else _literal(f"\n{_CLOSE_CALL}") + " | "
    name = _literal(f'{tool["name"]}">')
    rules.append(f"call{index}: {name} ({none}rest{index}::0)")
    rules.append(f"rest{index}::_: {' | '.join(rest)}")
    return rules


def _check_root(root: Mapping[str, Any]) -> None:
    """Refuse the parameters of a strict tool if they are not a plain object."""
    if others := sorted(root.keys() & _ROOT_REFUSED) or root.get("type", "object") != "object":
        problem = ", ".join(others) if others else f"the type {root['type']!r}"
        raise ValueError(
            f"is strict and has {problem} in its parameters; use an object with properties only."
        )
    properties = root.get("properties", {})
    if missing := sorted(set(root.get("required", ())) - properties.keys()):
        raise ValueError(f"requires {', '.join(missing)}, which its properties do not have.")
    if len(properties) > MAX_PARAMETERS:
        raise ValueError(
            f"is strict and has {len(properties)} parameters; {MAX_PARAMETERS} are supported."
        )


def _value_rules(rule: str, schema: Any, root: Mapping[str, Any]) -> list[str]:
    """A rule of the values of a schema, from `string=` on, and its terminals."""
    kinds = _kinds(schema, root)
    options, terminals = [], []
    if "string" in kinds:
        text = _text(schema, root)
        options.append('"true\\">" TEXT_VALUE' if text == "TEXT" else f'"true\\">" {rule.upper()}')
        terminals.append(f"{rule.upper()}: (({text}) & TEXT) {_literal(_CLOSE_PARAMETER)}")
    if "other" in kinds:
        document: dict[str, Any] = {"allOf": [schema, _NOT_STRING]}
        if '"$ref"' in json.dumps(schema):
            document["$defs"] = {"root": root}
        values = json_grammar(document).replace('"$ref": "#', '"$ref": "#/$defs/root')
        options.append(f'"false\\">" {values} {_literal(_CLOSE_PARAMETER)}')
    if not options:
        raise ValueError("is strict and has a parameter that no value satisfies.")
    return [f"{rule}: {' | '.join(options)}", *terminals]


def _parts(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Any]:
    """The schemas that a schema adds to its own keywords, all of which hold."""
    parts = list(schema.get("allOf", ()))
    if "$ref" in schema:
        parts.append(_referred(schema["$ref"], root))
    return parts


def _referred(reference: str, root: Any) -> Any:
    """The schema that a reference points to."""
    if reference != "#" and not reference.startswith("#/"):
        raise ValueError(f"has the $ref {reference!r}; write it as #/$defs/NAME.")
    for key in urllib.parse.unquote(reference).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        root = root[int(key)] if isinstance(root, list) else root[key]
    return root


def _kinds(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """Which of `_KINDS` of values a schema may allow."""
    if not isinstance(schema, Mapping):
        return _KINDS if schema else set()
    kind = lambda is_string: "string" if is_string else "other"
    kinds = _KINDS
    if types := schema.get("type"):
        types = [types] if isinstance(types, str) else types
        kinds = kinds & {kind(name == "string") for name in types}
    if "const" in schema or "enum" in schema:
        kinds = kinds & {kind(isinstance(value, str)) for value in _values(schema)}
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            kinds = kinds & set().union(*(_kinds(option, root) for option in schema[keyword]))
    for part in _parts(schema, root):
        kinds = kinds & _kinds(part, root)
    return kinds


def _values(schema: Mapping[str, Any]) -> list[Any]:
    """The values that `const` or `enum` list."""
    return [schema["const"]] if "const" in schema else schema["enum"]


def _text(schema: Any, root: Mapping[str, Any]) -> str:
    """A terminal of the strings that a schema allows."""
    if not isinstance(schema, Mapping):
        return "TEXT"
    terminals = [f"({_text(part, root)})" for part in _parts(schema, root)]
    if "const" in schema or "enum" in schema:
        texts = [_literal(value) for value in _values(schema) if isinstance(value, str)]
        terminals.append(f"({' | '.join(texts)})")
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            options = [option for option in schema[keyword] if "string" in _kinds(option, root)]
            terminals.append(f"({' | '.join(_text(option, root) for option in options)})")
    if "pattern" in schema:
        terminals.append(_search(schema["pattern"]))
    if "format" in schema:
        if schema["format"] not in _FORMATS:
            raise ValueError(
                f"has the format {schema['format']!r}; strict text may have {', '.join(_FORMATS)}."
            )
        terminals.append(f"/{_FORMATS[schema['format']]}/")
    if "minLength" in schema or "maxLength" in schema:
        limits = f"{schema.get('minLength', 0)},{schema.get('maxLength', '')}"
        terminals.append(f"/(?s:.{{{limits}}})/")
    return " & ".join(terminals) or "TEXT"


def _search(pattern: str) -> str:
    """A terminal of the strings in which a pattern of JSON Schema is found."""
    anchored = re.fullmatch(r"(\^?)((?:\\.|[^\\])*?)(\$?)", pattern, re.DOTALL)
    assert anchored, "llguidance has accepted the pattern"
    start, body, end = anchored.groups()
    before, after = "" if start else "(?s:.*)", "" if end else "(?s:.*)"
    return f"/{before}(?:{llguidance.regex_to_lark(body, 'dw')}){after}/"
