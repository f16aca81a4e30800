"""A chat request and its answer, as every dialect reads and writes them."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from v4jax.decoding.sampling import SamplingParams
from v4jax.engine.request import FinishReason, Token, Usage
from v4jax.text import chat_parser
from v4jax.text.chat_parser import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart

# revision of the checkpoint -> effort as clients name it -> effort of the encoder; None is the
# effort of requests that name none, as in DeepSeek's hosted API.
EFFORTS: dict[str, dict[str | None, str]] = {
    "april": {
        **{None: "high", "minimal": "high", "low": "high", "medium": "high", "high": "high"},
        **{"xhigh": "max", "max": "max", "ultra": "max"},
    },
    "0731": {
        **{None: "high", "minimal": "low", "low": "low", "medium": "high", "high": "high"},
        **{"xhigh": "high", "max": "max", "ultra": "max"},
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What a request for text says, whatever it continues.

    Attributes:
      model: the name that the client asked for.
      max_tokens: most new tokens, thinking included; None for what fits the context.
      sampling: settings of the draws.
      stop: strings that end the answer.
      top_logprobs: number of alternatives to report with each token; None for no log-probabilities.
      stream: whether the answer is streamed.
      include_usage: whether the stream's chunks carry usage, as OpenAI's `stream_options` says.
      user: whose prefixes may be shared.
      token_ids: report token ids of prompt and answer.
      prompt_logprobs: number of alternatives to report with each token of the prompt; None for no
        log-probabilities of these.
      routed_experts: report the experts chosen for each token.
    """

    model: str
    max_tokens: int | None = None
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    user: str = ""
    token_ids: bool = False
    prompt_logprobs: int | None = None
    routed_experts: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest(TextRequest):
    """A conversation to continue, read from any dialect.

    Attributes:
      messages: as for `v4jax.encode_chat`, without tools.
      tools: functions that may be called, as {"name", "description", "parameters", "strict"}.
      tool_choice: 'none', 'auto', 'required', or the one function to call as {"name"}.
      thinking: whether the model thinks before it answers.
      effort: a key of `EFFORTS`; None for the default.
      thinking_budget: most tokens of thinking before it is closed; None for no such limit.
      json: None for text, True for any JSON object, or a JSON schema.
      prefix: whether the last message is an answer's beginning, to be continued.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tool_choice: str | dict[str, str] = "auto"
    thinking: bool = True
    effort: str | None = None
    thinking_budget: int | None = None
    json: Any = None
    prefix: bool = False

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools


Delta = ReasoningDelta | ContentDelta | ToolCallStart | ArgumentsDelta


def message_of(events: Iterable[chat_parser.Event]) -> dict[str, Any]:
    """The message that events add up to, with the ids of its calls."""
    events = list(events)
    message = chat_parser.collect(events)
    starts = [event for event in events if isinstance(event, ToolCallStart)]
    calls = zip(message["tool_calls"], starts, strict=True)
    return message | {"tool_calls": [{"id": start.id} | call for call, start in calls]}


@dataclasses.dataclass(frozen=True)
class Update:
    """The next part of an answer, or with nothing new a sign of life.

    Attributes:
      deltas: new text and calls, in order.
      tokens: the tokens read since the last update, for log-probabilities and ids.
      reasoning: how many of these tokens belong to the reasoning; they come first.
      finish: why the answer has ended, 'tool_calls' included; None while it goes on.
      usage: what the request has cost so far.
      reasoning_tokens: tokens of reasoning so far.
      prompt: tokens of the prompt, once, if their ids or log-probabilities were asked for.
      stop: the stop string that has ended the answer; None if none has.
      index: which of the request's answers it is of.
      expert_TLA: at the end, the experts chosen for each token, if they were asked for.
    """

    deltas: tuple[Delta, ...]
    tokens: tuple[Token, ...]
    reasoning: int
    finish: FinishReason | str | None
    usage: Usage
    reasoning_tokens: int
    prompt: tuple[Token, ...] = ()
    stop: str | None = None
    index: int = 0
    expert_TLA: Any = None

    @property
    def is_empty(self) -> bool:
        """Whether it is only a sign of life."""
        return not self.tokens and self.finish is None
