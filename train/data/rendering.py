"""Rendering of rows of training data as token ids, with marks for the trained ones.

Axis letters: N tokens of a document, S bytes of its text, V tokens of the vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from v4jax.text import chat
from v4jax.text.chat import Segment
from v4jax.text.tokenizer import Tokenizer

from .rows import ChatRow, CompletionRow, Row, TextRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderSettings:
    """How rows become tokens; a row's own fields take precedence.

    Attributes:
      thinking_mode: 'chat' or 'thinking' for conversations that do not say; unset: each must say.
      reasoning_effort: effort for conversations that do not say: 'high' or 'max', or 'low' with
        revision '0731'; unset: none is written.
      drop_thinking: leave out the reasoning of turns before the last user message. Such a turn is
        still trained, as an answer without reasoning, unless `turns` is 'last'.
      revision: revision of the chat encoding, 'april' or '0731'.
      reasoning: train the reasoning too, including the mark that ends it. Empty reasoning teaches
        the model to answer at once.
      turns: assistant messages to train: 'all', or only the 'last' of each row. A message's own
        `train` field takes precedence.
    """

    thinking_mode: str | None = None
    reasoning_effort: str | None = None
    drop_thinking: bool = True
    revision: str = "april"
    reasoning: bool = True
    turns: str = "all"

    def __post_init__(self) -> None:
        """Reject settings with which no row can be written."""
        mode = self.thinking_mode or "chat"
        chat.chat_segments([], mode, self.reasoning_effort, revision=self.revision)
        if self.turns not in ("all", "last"):
            raise ValueError(f"turns is '{self.turns}'; use 'all' or 'last'.")


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """The tokens of one row, and whether each is a training target.

    `unspoken` counts the assistant messages whose reasoning is not among the tokens.
    """

    ids_N: Int32[np.ndarray, " N"]
    trained_N: Bool[np.ndarray, " N"]
    unspoken: int = 0


class Renderer:
    """Renders rows with one tokenizer and one set of settings."""

    def __init__(self, tokenizer: Tokenizer, settings: RenderSettings):
        """Look up the size in bytes of every token.

        Raises:
          ValueError: the tokenizer has no BOS or EOS token.
        """
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise ValueError(
                f"The tokenizer has no {chat.BOS} or no {chat.EOS}; use that of a V4 checkpoint."
            )
        self._tokenizer = tokenizer
        self._settings = settings
        sizes = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
        self._sizes_V = np.array(sizes, np.int64)

    def render(self, row: Row) -> Document:
        """The tokens of a row.

        A conversation has the tokens of the text from `chat.encode_chat`; those of assistant
        messages, including EOS, are trained. A token that is only partly inside such a message is
        not. A prompt and its completion are tokenized separately, as when the model continues the
        prompt. Texts are trained entirely. BOS and EOS are added to prompts, completions and texts
        that lack them.

        Raises:
          ValueError: the row cannot be rendered, has nothing to train, or neither it nor the
            settings state a thinking mode.
        """
        match row:
            case ChatRow():
                return self._chat(row)
            case CompletionRow(prompt=prompt, completion=completion):
                parts = (_begun(prompt), False), (_ended(completion), True)
            case TextRow(text=text):
                parts = ((_ended(_begun(text)), True),)
        return _joined([(self._tokenizer.encode(text), trained) for text, trained in parts])

    def _chat(self, row: ChatRow) -> Document:
        settings = self._settings
        mode = row.thinking_mode or settings.thinking_mode
        if mode is None:
            raise ValueError(
                "thinking_mode is set neither in the row nor in the settings; use 'chat' or "
                "'thinking'."
            )
        drop = settings.drop_thinking if row.drop_thinking is None else row.drop_thinking
        messages = _with_head(row)
        segments = chat.chat_segments(
            messages,
            mode,
            row.reasoning_effort or settings.reasoning_effort,
            drop_thinking=drop,
            revision=settings.revision,
        )
        flags = self._flags(segments, messages)
        ids_N = np.array(self._tokenizer.encode("".join(s.text for s in segments)), np.int32)
        trained_N = self._inside(ids_N, segments, flags)
        if not trained_N.any():
            raise ValueError("messages have no assistant's token to train; leave the row out.")
        reasoned = {i for i, message in enumerate(messages) if message.get("reasoning_content")}
        written = {segment.message for segment in segments if segment.reasoning}
        return Document(ids_N, trained_N, len(reasoned - written))

    def _flags(self, segments: Sequence[Segment], messages: Sequence[dict]) -> list[bool]:
        """Whether each segment is trained."""
        settings = self._settings
        last = max((s.message for s in segments if s.message is not None), default=None)

        def trained(segment: Segment) -> bool:
            if segment.message is None or (segment.reasoning and not settings.reasoning):
                return False
            flag = messages[segment.message].get("train")
            return (settings.turns == "all" or segment.message == last) if flag is None else flag

        return [trained(segment) for segment in segments]

    def _inside(
        self, ids_N: Int32[np.ndarray, " N"], segments: Sequence[Segment], flags: Sequence[bool]
    ) -> Bool[np.ndarray, " N"]:
        """Whether all bytes of each token are in trained segments."""
        trained_S = np.repeat(flags, [len(segment.text.encode()) for segment in segments])
        sizes_N = self._sizes_V[ids_N]
        ends_N = np.cumsum(sizes_N)
        if ends_N[-1] != len(trained_S):
            raise ValueError("The tokenizer changes the text; use that of a V4 checkpoint.")
        before_S1 = np.concatenate([[0], np.cumsum(trained_S)])
        return before_S1[ends_N] - before_S1[ends_N - sizes_N] == sizes_N


def _with_head(row: ChatRow) -> list[dict]:
    """The row's messages, with its system text and tools in a system message at the start."""
    head: dict[str, Any] = {"content": row.system, "tools": row.tools}
    head = {field: value for field, value in head.items() if value}
    if not head:
        return row.messages
    try:
        chat.encode_chat([{"role": "system", **head}])
    except ValueError as error:
        raise ValueError(str(error).removeprefix("messages[0].")) from None
    # Rejected before a system message is added, so that an error has the row's own indices.
    chat.encode_chat(row.messages)
    first = row.messages[0]
    if first["role"] != "system":
        return [{"role": "system", **head}, *row.messages]
    for field, name in (("tools", "tools are"), ("content", "system is")):
        if field in head and first.get(field):
            raise ValueError(f"{name} given by the row and by messages[0]; leave one out.")
    return [{**first, **head}, *row.messages[1:]]


def _begun(text: str) -> str:
    return text if text.startswith(chat.BOS) else chat.BOS + text


def _ended(text: str) -> str:
    return text if text.endswith(chat.EOS) else text + chat.EOS


def _joined(parts: Sequence[tuple[list[int], bool]]) -> Document:
    ids_N = np.array([i for ids, _ in parts for i in ids], np.int32)
    return Document(ids_N, np.repeat([flag for _, flag in parts], [len(ids) for ids, _ in parts]))
