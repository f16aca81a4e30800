"""The chat encoding of DeepSeek-V4: a list of messages becomes the text of the prompt.

The checkpoints have no chat template. Their reference encoder (`encoding_dsv4.py`) defines the
text, and the rules below follow it: first every message is read into a `_Turn`, which rejects
anything invalid; then turns are merged, sorted, thinned out and written.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NoReturn

from v4jax.arguments import FLAG, TEXT, checked, choice, one_of, optional, sequence, shown

_BAR = "\uff5c"
BOS = f"<{_BAR}begin\u2581of\u2581sentence{_BAR}>"
EOS = f"<{_BAR}end\u2581of\u2581sentence{_BAR}>"
USER, ASSISTANT = f"<{_BAR}User{_BAR}>", f"<{_BAR}Assistant{_BAR}>"
LATEST_REMINDER = f"<{_BAR}latest_reminder{_BAR}>"
THINK, END_THINK = "<think>", "</think>"
DSML = f"{_BAR}DSML{_BAR}"
TASKS = {
    task: f"<{_BAR}{task}{_BAR}>"
    for task in ("action", "query", "authority", "domain", "title", "read_url")
}
SPECIAL_TOKENS = (
    *(BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, THINK, END_THINK, DSML),
    *TASKS.values(),
)

# Types of text parts in Chat Completions and Anthropic's messages, and in Responses.
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_MODES = ("chat", "thinking")
ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
# revision -> effort -> name of the text before the first message; None means no text.
EFFORTS: dict[str, dict[str | None, str | None]] = {
    "april": {None: None, "high": None, "max": "effort_absolute"},
    "0731": {None: None, "low": None, "high": "effort_absolute", "max": "effort_beyond"},
}
_SETTINGS = {
    "thinking_mode": choice(*THINKING_MODES),
    "reasoning_effort": optional(TEXT),
    "drop_thinking": FLAG,
    "revision": choice(*EFFORTS),
    "context": sequence("a list of messages"),
    "add_bos": FLAG,
}


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a conversation's text.

    `message` is the index of the assistant message that it belongs to, `EOS` included, or None for
    text that the model is given. `reasoning` marks the message's thinking, `END_THINK` included.
    """

    text: str
    message: int | None = None
    reasoning: bool = False


@checked(messages=sequence("a list of one or more messages", least=1), **_SETTINGS)
def encode_chat(
    messages: Sequence[Any],
    thinking_mode: str = "chat",
    reasoning_effort: str | None = None,
    *,
    drop_thinking: bool = True,
    revision: str = "april",
    context: Sequence[Any] = (),
    add_bos: bool = True,
) -> str:
    """Write a conversation as the text that the model was trained to continue.

    Args:
      messages: objects in OpenAI's format with the roles in `ROLES`; never modified. Beyond
        OpenAI's fields: `tools` and `response_format` (system and developer), `reasoning_content`
        and `wo_eos` (assistant), `task` (one of `TASKS`). Fields that V4 does not define are
        ignored. A user message after a user or tool message is merged into it and loses its own
        `task`, as in the reference.
      thinking_mode: "chat" closes the reasoning before the answer, "thinking" opens it.
      reasoning_effort: None, "high" or "max" in April; None, "low", "high" or "max" in 0731.
      drop_thinking: drop the reasoning of turns before the last user or developer message, and
        developer messages before it. Has no effect if any message has `tools`.
      revision: the checkpoints' encoder, "april" or "0731"; they differ in the effort texts only.
      context: already encoded messages before `messages`. They are taken into account but not
        written, and nothing is merged into them.
      add_bos: begin with `BOS`, unless there is a context.

    Raises:
      ValueError: the encoding does not define an argument or a field of a message; the error names
        the message's index and the field.
    """
    settings: Any = {"drop_thinking": drop_thinking, "revision": revision, "add_bos": add_bos}
    segments = chat_segments(messages, thinking_mode, reasoning_effort, context=context, **settings)
    return "".join(segment.text for segment in segments)


@checked(messages=sequence("a list of messages"), **_SETTINGS)
def chat_segments(
    messages: Sequence[Any],
    thinking_mode: str = "chat",
    reasoning_effort: str | None = None,
    *,
    drop_thinking: bool = True,
    revision: str = "april",
    context: Sequence[Any] = (),
    add_bos: bool = True,
) -> list[Segment]:
    """The text of `encode_chat`, with the same arguments, in segments that show who writes them."""
    thinking = thinking_mode == "thinking"
    effort = _effort_text(reasoning_effort, revision)
    before = _merge([_read(m, f"context[{i}]", None) for i, m in enumerate(context)])
    turns = before + _merge([_read(m, f"messages[{i}]", i) for i, m in enumerate(messages)])
    _sort_results(turns)

    drop = drop_thinking and not any(turn.has_tools for turn in turns)
    start = len(before)
    if thinking and drop:
        # The reference subtracts lengths instead, and so loses messages after a context that ends
        # in a developer message; here everything after the context is always written.
        survives = _survivors(turns)
        start = sum(survives[:start])
        turns = [turn for turn, written in zip(turns, survives, strict=True) if written]

    since = _last_user(turns) if drop else -1
    segments = [Segment(BOS)] if add_bos and not context else []
    if thinking and start == 0 and turns:
        segments.append(Segment(effort))
    for i in range(start, len(turns)):
        segments += _write(turns, i, thinking, since)
    return segments


@dataclasses.dataclass
class _Part:
    """A part of a user turn; `call_id` is None unless it is a tool result."""

    text: str
    call_id: str | None = None


@dataclasses.dataclass(kw_only=True)
class _Turn:
    """A checked message. `text` is ready to be written, except for a user's blocks and an
    assistant's reasoning, which depend on the surrounding turns.
    """

    role: str
    message: int | None = None
    text: str = ""
    blocks: list[_Part] = dataclasses.field(default_factory=list)
    reasoning: str = ""
    call_order: dict[str, int] | None = None
    task: str | None = None
    has_tools: bool = False


def _merge(turns: list[_Turn]) -> list[_Turn]:
    """Join tool results and user texts that follow each other into one user turn."""
    merged: list[_Turn] = []
    for turn in turns:
        user = merged[-1] if merged and merged[-1].role == "user" else None
        if user and (turn.role == "tool" or (turn.role == "user" and user.task is None)):
            user.blocks += turn.blocks
        elif turn.role == "tool":
            merged.append(_Turn(role="user", blocks=turn.blocks))
        else:
            merged.append(turn)
    return merged


def _sort_results(turns: list[_Turn]) -> None:
    """Sort each user turn's tool results into the order of the calls; texts keep their places."""
    order: dict[str, int] = {}
    for turn in turns:
        order = order if turn.call_order is None else turn.call_order
        results = (b for b in turn.blocks if b.call_id is not None)
        in_order = iter(sorted(results, key=lambda b: order.get(b.call_id or "", 0)))
        turn.blocks = [b if b.call_id is None else next(in_order) for b in turn.blocks]


def _last_user(turns: list[_Turn]) -> int:
    """Index of the last user or developer turn, or -1."""
    return max((i for i, t in enumerate(turns) if t.role in ("user", "developer")), default=-1)


def _survivors(turns: list[_Turn]) -> list[bool]:
    """Which turns are written when thinking is dropped: no developer turns before `_last_user`."""
    last = _last_user(turns)
    return [turn.role != "developer" or i >= last for i, turn in enumerate(turns)]


def _write(turns: list[_Turn], index: int, thinking: bool, since: int) -> list[Segment]:
    """One turn and what follows it; reasoning is shown from turn `since` on."""
    turn = turns[index]
    segments = []
    if turn.role == "assistant":
        answers_task = index > 0 and turns[index - 1].task is not None
        if thinking and index > since and not answers_task:
            segments.append(Segment(turn.reasoning + END_THINK, turn.message, reasoning=True))
        segments.append(Segment(turn.text, turn.message))
    elif turn.role == "user":
        segments.append(Segment(USER + "\n\n".join(block.text for block in turn.blocks)))
    else:
        segments.append(Segment(turn.text))
    if index + 1 < len(turns) and turns[index + 1].role not in ("assistant", "latest_reminder"):
        return segments
    return [*segments, Segment(_opening(turn, thinking, thinking and index >= since))]


def _opening(turn: _Turn, thinking: bool, shown: bool) -> str:
    """The text between a turn and the answer to it."""
    if turn.task == "action":
        return ASSISTANT + (THINK if thinking else END_THINK) + TASKS["action"]
    if turn.task is not None:
        return TASKS[turn.task]
    if turn.role in ("user", "developer"):
        return ASSISTANT + (THINK if shown else END_THINK)
    return ""


def _read(message: Any, where: str, index: int | None) -> _Turn:
    """Check one message and convert it to a turn."""
    if not isinstance(message, Mapping):
        _refuse(where, f"is {_kind(message)}; a message is an object with 'role' and 'content'.")
    role: Any = message.get("role")
    if not one_of(role, ROLES):
        _refuse(f"{where}.role", f"is {shown(role)}; use one of {', '.join(ROLES)}.")
    content = _content(message, role, where)
    turn = _Turn(role=role, message=index, task=_task(message, where))
    match role:
        case "user":
            turn.blocks = [_Part(content)]
        case "tool":
            call_id = _optional_string(message, "tool_call_id", where)
            turn.blocks = [_Part(f"<tool_result>{content}</tool_result>", call_id)]
        case "assistant":
            calls = _calls(message, where)
            order = {call_id: i for i, (call_id, _) in enumerate(calls) if call_id}
            turn.call_order = order if calls else None
            turn.reasoning = _optional_string(message, "reasoning_content", where)
            end = "" if message.get("wo_eos") else EOS
            turn.text = content + _calls_block([text for _, text in calls]) + end
        case "system":
            turn.text = content + _sections(message, where)
        case "developer":
            turn.text = USER + content + _sections(message, where)
        case "latest_reminder":
            turn.text = LATEST_REMINDER + content
    if role not in ("user", "tool"):
        turn.has_tools = bool(_tools(message, where))
    return turn


def _content(message: Mapping[str, Any], role: str, where: str) -> str:
    """A message's content as text; parts of a list are joined by blank lines."""
    where = f"{where}.content"
    if role == "user" and "content" not in message and "content_blocks" in message:
        _refuse(where, "is missing; give the parts of content_blocks as a list in content.")
    content = message.get("content", "" if role in ("user", "tool") else None)
    if content is None and role in ("system", "assistant"):
        return ""
    if isinstance(content, (list, tuple)):
        content = "\n\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        _refuse(where, f"is {_kind(content)}; give a string or a list of text parts.")
    if role == "developer" and not content:
        _refuse(where, "is empty; a developer message needs text (leave the message out instead).")
    return content


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        _refuse(where, f'is {_kind(part)}; a part is an object such as {{"type": "text", ...}}.')
    if part.get("type") not in TEXT_PARTS:
        return f"[Unsupported {part.get('type')}]"
    return _optional_string(part, "text", where)


def _task(message: Mapping[str, Any], where: str) -> str | None:
    task = message.get("task")
    if task is not None and not one_of(task, TASKS):
        hint = f"leave it out or use one of {', '.join(TASKS)}"
        _refuse(f"{where}.task", f"is {shown(task)}; {hint}.")
    return task


def _calls(message: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    """The id (or '') and the DSML of each of an assistant's tool calls."""
    calls = []
    for i, call in enumerate(_list(message, "tool_calls", where)):
        at = f"{where}.tool_calls[{i}]"
        function = _function(call, at)
        call_id = _optional_string(call, "id", at) or _optional_string(function, "id", at)
        if not isinstance(name := function.get("name"), str):
            _refuse(f"{at}.function.name", f"is {_kind(name)}; give a string.")
        if "arguments" not in function:
            _refuse(f"{at}.function.arguments", "is missing; give an object, or its JSON text.")
        parameters = _parameters(function["arguments"], f"{at}.function.arguments")
        opening = f'<{DSML}invoke name="{name}">'
        calls.append((call_id, f"{opening}\n{parameters}\n</{DSML}invoke>"))
    return calls


def _calls_block(calls: list[str]) -> str:
    if not calls:
        return ""
    return f"\n\n<{DSML}tool_calls>\n" + "\n".join(calls) + f"\n</{DSML}tool_calls>"


def _parameters(arguments: Any, where: str) -> str:
    """Arguments in DSML; anything but a JSON object becomes one parameter named `arguments`."""
    text = arguments if isinstance(arguments, str) else _json(arguments, where)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        values = {"arguments": text}
    rows = []
    for name, value in values.items():
        is_string = isinstance(value, str)
        text = value if is_string else _json(value, where)
        opening = f'<{DSML}parameter name="{name}" string="{str(is_string).lower()}">'
        rows.append(f"{opening}{text}</{DSML}parameter>")
    return "\n".join(rows)


def _sections(message: Mapping[str, Any], where: str) -> str:
    """The tools and the response format of a system or developer message."""
    text = ""
    if tools := _tools(message, where):
        schemas = [_json(tool, f"{where}.tools[{i}].function") for i, tool in enumerate(tools)]
        text += "\n\n" + _texts()["tools"].replace("{schemas}", "\n".join(schemas))
    if response_format := message.get("response_format"):
        schema = _json(response_format, f"{where}.response_format")
        text += "\n\n" + _texts()["response_format"].replace("{schema}", schema)
    return text


def _tools(message: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    tools = _list(message, "tools", where)
    return [_function(tool, f"{where}.tools[{i}]") for i, tool in enumerate(tools)]


def _function(value: Any, where: str) -> Mapping[str, Any]:
    """The `function` object of a tool or of a tool call."""
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        _refuse(where, 'has no function object; give {"type": "function", "function": {...}}.')
    return function


def _list(message: Mapping[str, Any], field: str, where: str) -> Sequence[Any]:
    value = message.get(field)
    if value is not None and not isinstance(value, (list, tuple)):
        _refuse(f"{where}.{field}", f"is {_kind(value)}; give a list, or leave it out.")
    return value or ()


def _optional_string(message: Mapping[str, Any], field: str, where: str) -> str:
    value = message.get(field)
    if value is not None and not isinstance(value, str):
        _refuse(f"{where}.{field}", f"is {_kind(value)}; give a string, or leave it out.")
    return value or ""


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        _refuse(where, f"is not a JSON value ({error}); use objects, lists, strings and numbers.")


def _effort_text(effort: str | None, revision: str) -> str:
    efforts = EFFORTS[revision]
    if effort not in efforts:
        known = ", ".join(str(name) for name in efforts)
        _refuse("reasoning_effort", f"is {shown(effort)}; revision {revision} has {known}.")
    name = efforts[effort]
    return _texts()[name] if name else ""


@functools.cache
def _texts() -> dict[str, str]:
    """The long texts of the encoding, byte for byte; the file names their source."""
    file = resources.files("v4jax").joinpath("data", "chat_texts.json")
    return json.loads(file.read_text(encoding="utf-8"))


def _kind(value: Any) -> str:
    return "missing or null" if value is None else type(value).__name__


def _refuse(where: str, problem: str) -> NoReturn:
    raise ValueError(f"{where} {problem}")
