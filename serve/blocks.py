"""Answers as lists of blocks, which Anthropic's messages and OpenAI's responses are."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from v4jax.text.chat_parser import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart

from .conversation import ChatRequest, Update
from .errors import ApiError
from .service import RETRY_SECONDS
from .streams import Writer

Kind = Literal["reasoning", "text", "call"]
_KINDS: dict[type, Kind] = {
    ReasoningDelta: "reasoning",
    ContentDelta: "text",
    ToolCallStart: "call",
    ArgumentsDelta: "call",
}
Change = tuple[Literal["start", "delta", "stop"], int, str]


@dataclasses.dataclass
class Block:
    """A part of an answer: reasoning, text or a call.

    Attributes:
      kind: which of them.
      pieces: its text, or the call's arguments, as they came.
      call_id, name: of the call.
    """

    kind: Kind
    pieces: list[str] = dataclasses.field(default_factory=list)
    call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """All pieces together."""
        return "".join(self.pieces)


class BlockWriter(Writer):
    """Writes an answer as blocks.

    Attributes:
      blocks: those so far.
      last: the last update; None before the first.
      token_ids: ids of prompt and answer, as fields, if they were asked for.
    """

    def __init__(self, request: ChatRequest) -> None:
        self.blocks: list[Block] = []
        self.last: Update | None = None
        names = ("prompt_token_ids", "token_ids") if request.token_ids else ()
        self.token_ids: dict[str, list[int]] = {name: [] for name in names}

    @property
    def finish(self) -> str:
        """Why the answer has ended; "" while it goes on."""
        return (self.last and self.last.finish) or ""

    @abc.abstractmethod
    def body(self) -> dict[str, Any]:
        """The answer so far."""

    def whole(self, updates: Sequence[Update]) -> dict[str, Any]:
        """The answer with all updates."""
        for update in updates:
            for _ in self.events(update):
                pass
        return self.body()

    def add(self, update: Update) -> Iterator[Change]:
        """Add an update to the blocks; yields each change, the block's index and the new text.

        A block stops where the next one starts, or when the answer has ended.

        Raises:
          ApiError: the answer had to be ended early, which is an error in these dialects.
        """
        if update.finish == "overload":
            message = "The answer was ended early: the server has no more memory or time."
            raise ApiError(503, message, retry_after=RETRY_SECONDS)
        self.last, blocks = update, self.blocks
        if self.token_ids:
            self.token_ids["prompt_token_ids"] += [token.id for token in update.prompt]
            self.token_ids["token_ids"] += [token.id for token in update.tokens]
        for delta in update.deltas:
            kind = _KINDS[type(delta)]
            start = isinstance(delta, ToolCallStart)
            if start or not blocks or blocks[-1].kind != kind:
                blocks.append(Block(kind, [], delta.id, delta.name) if start else Block(kind))
                if len(blocks) > 1:
                    yield "stop", len(blocks) - 2, ""
                yield "start", len(blocks) - 1, ""
            if not start:
                blocks[-1].pieces.append(delta.text)
                yield "delta", len(blocks) - 1, delta.text
        if update.finish is not None and blocks:
            yield "stop", len(blocks) - 1, ""
