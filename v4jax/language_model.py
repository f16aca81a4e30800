"""`LanguageModel`, which `v4jax.load` returns: a model with its tokenizer.

Axis letters: B batch, T tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Float32

from v4jax import arguments, waiting
from v4jax.adapters import updates
from v4jax.arguments import shown
from v4jax.checkpoints.disk import CheckpointError
from v4jax.decoding import sampling as samplings
from v4jax.decoding.loaded import Loaded, NotFiniteError
from v4jax.decoding.sampling import SamplingParams
from v4jax.engine import batch
from v4jax.engine import settings as engine_settings
from v4jax.engine.request import Request
from v4jax.generation import Answer, ChatAnswer, Generation, Score
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.transformer import Model
from v4jax.text.chat import encode_chat
from v4jax.text.chat_parser import parse_chat
from v4jax.text.stopping import STOP
from v4jax.text.tokenizer import Tokenizer

Chat = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Chat
# Arguments of `generate`, `stream` and `chat`.
_KINDS = {
    "max_tokens": arguments.integer(1),
    "stop": STOP,
    "speculate": arguments.optional(arguments.TEXT),
    **samplings.KINDS,
}


@arguments.checked(
    weights=arguments.instance("a v4jax.model.transformer.Model", Model),
    config=arguments.instance("a v4jax.model.config.ModelConfig", ModelConfig),
    numerics=arguments.instance("a v4jax.model.numerics.Numerics", Numerics),
    dtype=arguments.dtype("bfloat16", "float32"),
    tokenizer=arguments.optional(arguments.instance("a v4jax.text.tokenizer.Tokenizer", Tokenizer)),
)
@dataclasses.dataclass(frozen=True, repr=False)
class LanguageModel(Loaded):
    """A model ready to run.

    Attributes:
      tokenizer: the tokenizer; None if the checkpoint has none.
    """

    tokenizer: Tokenizer | None = None

    def _summary(self) -> str:
        return f"{super()._summary()}, {'with' if self.tokenizer else 'without'} tokenizer"

    @arguments.checked(path=arguments.optional(arguments.PATH))
    def with_adapter(self, path: str | Path | None) -> "LanguageModel":
        """The same model with another adapter; the arrays of the base model are shared.

        Args:
          path: a PEFT adapter (a directory or a Hub id) or the directory of a training run; None
            for no adapter.

        Raises:
          CheckpointError: the path is neither, is damaged, is for another model, or is a run that
            trained no adapter.
        """
        if path is None:
            changed = updates.detach(self.weights, self.config)
        else:
            update = updates.read(updates.resolve(path), self.config)
            if isinstance(update, updates.Replaced):
                raise CheckpointError(
                    f"{path}: trained the weights in full, so there is no base to share; "
                    "pass it to 'v4jax.load'."
                )
            changed = updates.attach(self.weights, self.config, update, self.dtype)
        return dataclasses.replace(self, weights=changed)

    @arguments.checked(tokens=arguments.TOKEN_ROWS)
    def logits(self, tokens: Any) -> Float32[np.ndarray, "B T V"]:
        """Logits at every position.

        Args:
          tokens: token ids [B, T], not empty.

        Raises:
          ValueError: `tokens` is not of shape [B, T], is empty, is too long for the model, or has
            an id outside the vocabulary.
          NotFiniteError: the logits are not finite.
        """
        for row in tokens:
            self._check_tokens(row)
        self._room(len(tokens[0]), 0)
        with waiting.compilation("Computing logits"):
            return self.logits_of(tokens)

    @overload
    def generate(self, prompt: str | Sequence[int] | Chat, **settings: Any) -> Generation: ...

    @overload
    def generate(
        self, prompt: list[str] | list[list[int]] | list[Chat], **settings: Any
    ) -> list[Generation]: ...

    @arguments.checked(
        **_KINDS,
        prompt=arguments.PROMPTS,
        top_logprobs=arguments.integer(0),
        progress=arguments.optional(arguments.FUNCTION),
    )
    def generate(
        self,
        prompt: Any,
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        top_logprobs: int = 0,
        speculate: str | None = None,
        progress: waiting.Progress | None = None,
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """Continue a prompt, or several at once.

        Args:
          prompt: text, token ids or the messages of a chat, or a list of these. Text is tokenized
            unchanged; the messages of a chat are encoded without thinking (see `chat`).
          max_tokens: maximum number of new tokens of each.
          stop: strings that end a text and are not part of it.
          top_logprobs: number of most probable tokens to report for each token.
          speculate: 'mtp:2' drafts two tokens with the MTP block; the texts are the same.
          progress: called with the name of the present task, the amount done and the total; by
            default they are shown on a terminal and in a notebook.
          sampling: fields of `SamplingParams`: temperature, top_k, top_p, min_p, seed, penalties.

        Returns:
          The generation or, of a list of prompts, those of each in order.

        Raises:
          ValueError: an argument is invalid, a prompt is too long for the model, or it is text
            and there is no tokenizer.
          NotFiniteError: the model's logits are not finite.
        """
        is_one = not isinstance(prompt, arguments.Batch)
        prompts = [prompt] if is_one else [*prompt]
        engine_settings.drafts_of(speculate, self)
        settings = {"max_tokens": max_tokens, "stop": stop, "sampling": sampling}
        requests, answers = self._requests(prompts, top_logprobs, **settings)
        texts = [""] * len(prompts)
        events = self._events(requests, speculate, None if is_one else progress)
        for i, event in events:
            texts[i] += answers[i].add(event)
        generations = [answer.generation(t) for answer, t in zip(answers, texts, strict=True)]
        return generations[0] if is_one else generations

    @arguments.checked(**_KINDS, prompt=arguments.PROMPT)
    def stream(
        self,
        prompt: str | Sequence[int] | Chat,
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        speculate: str | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The text of `generate` in pieces of whole characters, without parts of stop strings."""
        if self.tokenizer is None:
            raise ValueError(
                "This checkpoint has no tokenizer.json, so there is no text to stream."
            )
        engine_settings.drafts_of(speculate, self)
        settings = {"max_tokens": max_tokens, "stop": stop, "sampling": sampling}
        requests, (answer,) = self._requests([prompt], 0, **settings)
        pieces = (answer.add(event) for _, event in self._events(requests, speculate, None))
        return filter(None, pieces)

    @arguments.checked(
        **_KINDS,
        messages=arguments.sequence("a list of one or more messages", least=1),
        tools=arguments.optional(arguments.sequence("a list of tools")),
        thinking=arguments.choice("off", "low", "high", "max"),
    )
    def chat(
        self,
        messages: Chat,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: str = "off",
        max_tokens: int = 4096,
        stop: str | Sequence[str] = (),
        speculate: str | None = None,
        **sampling: Any,
    ) -> ChatAnswer:
        """Answer a conversation.

        Args:
          messages: messages in OpenAI's format; see `v4jax.encode_chat`.
          tools: tools that may be called, in OpenAI's format.
          thinking: reasoning effort before the answer; checkpoints before 0731 do not support
            'low'.
          max_tokens: maximum number of new tokens, those of the reasoning included.
          stop: as for `generate`.
          speculate: as for `generate`.
          sampling: as for `generate`.

        Raises:
          ValueError: an argument is invalid, the conversation is too long, or the checkpoint has
            no tokenizer or does not support the effort.
          NotFiniteError: the model's logits are not finite.
        """
        encoding = self._chat_settings(thinking)
        text = encode_chat([*_tools(tools), *messages], **encoding)
        settings = {"max_tokens": max_tokens, "stop": stop, "speculate": speculate}
        generation = self.generate(text, **settings, **sampling)
        answer = parse_chat(generation.text, encoding.get("thinking_mode", "chat"))
        calls = answer["tool_calls"]
        return ChatAnswer(answer["content"], answer["reasoning_content"], calls, generation)

    @overload
    def score(self, text: str | Sequence[int], *, progress: Any = None) -> Score: ...

    @overload
    def score(self, text: list[str] | list[list[int]], *, progress: Any = None) -> list[Score]: ...

    @arguments.checked(text=arguments.PROMPTS, progress=arguments.optional(arguments.FUNCTION))
    def score(self, text: Any, *, progress: waiting.Progress | None = None) -> Score | list[Score]:
        """Log-probabilities of a text's tokens, or of several texts'.

        Args:
          text: text or token ids, or a list of these; at least two tokens each.
          progress: as for `generate`.

        Raises:
          ValueError: a text is too short, too long for the model, or there is no tokenizer.
          NotFiniteError: the model's logits are not finite.
        """
        is_one = not isinstance(text, arguments.Batch)
        rows = [self._encode(each) for each in ([text] if is_one else text)]
        for row in rows:
            self._check_tokens(row)
            self._room(len(row), 0)
            if len(row) < 2:
                raise ValueError("A text of one token has nothing to score; pass two or more.")
        requests = [Request(tokens=row, max_tokens=0, prompt_logprobs=True) for row in rows]
        scores: list[Any] = [None] * len(rows)
        for i, event in self._events(requests, None, None if is_one else progress):
            if event.prompt:
                logprobs = [token.logprob for token in event.prompt[1:]]
                if not np.isfinite(logprobs).all():
                    raise NotFiniteError
                scores[i] = Score(rows[i], logprobs)
        return scores[0] if is_one else scores

    def _requests(
        self,
        prompts: Sequence[Prompt],
        top_logprobs: int,
        *,
        max_tokens: int,
        stop: str | Sequence[str],
        sampling: dict[str, Any],
    ) -> tuple[list[Request], list[Answer]]:
        """A request for each prompt, and what reads its answer."""
        if top_logprobs > self.config.vocab_size:
            raise ValueError(
                f"top_logprobs is {shown(top_logprobs)}; it must be 0 to the vocabulary's size."
            )
        rows = [self._encode(prompt) for prompt in prompts]
        for row in rows:
            self._check_tokens(row)
        rooms = [self._room(len(row), 1) for row in rows]
        if stop and self.tokenizer is None:
            raise ValueError("This checkpoint has no tokenizer.json, so there is no text to stop.")
        answers = [Answer(self.tokenizer, stop) for _ in rows]
        requests = [
            Request(
                tokens=row,
                max_tokens=min(max_tokens, room),
                sampling=SamplingParams(**sampling),
                stop_tokens=self.config.eos_token_ids,
                watcher=lambda answer=answer: answer,
                top_logprobs=top_logprobs,
            )
            for row, room, answer in zip(rows, rooms, answers, strict=True)
        ]
        return requests, answers

    def _events(
        self, requests: list[Request], speculate: str | None, progress: waiting.Progress | None
    ) -> Iterator[tuple[int, Any]]:
        """The events of requests; terminals and notebooks show the wait for them."""
        events = batch.answer(self, requests, speculate=speculate)
        if len(requests) == 1:
            task: str | None = "Reading the prompt"
            while True:
                with waiting.compilation(task):
                    event = next(events, None)
                if event is None:
                    return
                yield event
                task = None
        done = 0
        with waiting.progress(progress) as report:
            report("Generating", done, len(requests))
            for i, event in events:
                if event.finish is not None:
                    done += 1
                    report("Generating", done, len(requests))
                yield i, event

    def _encode(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            prompt = encode_chat(prompt, **self._chat_settings("off"))
        if not isinstance(prompt, str):
            return [*prompt]
        if self.tokenizer is None:
            raise ValueError("This checkpoint has no tokenizer.json; pass the prompt as token ids.")
        return self.tokenizer.encode(prompt)

    def _chat_settings(self, thinking: str) -> dict[str, Any]:
        """Arguments of `encode_chat` for a reasoning effort."""
        settings: dict[str, Any] = {"revision": self.config.chat_revision}
        if thinking != "off":
            settings |= {"thinking_mode": "thinking", "reasoning_effort": thinking}
        return settings

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ValueError("The prompt is empty; pass at least one token.")
        for at, token in enumerate(tokens):
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"Token {shown(token)} at position {at} is outside the vocabulary of "
                    f"{self.config.vocab_size}."
                )

    def _room(self, length: int, new: int) -> int:
        """The room for new tokens after `length`; raises if it is less than `new`."""
        limit = self.config.max_position_embeddings
        if length + new > limit:
            raise ValueError(
                f"The prompt has {length} tokens; the model's context holds {limit}, "
                "including the answer. Shorten the prompt."
            )
        return limit - length


def _tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The message that declares tools, if there are any."""
    return [{"role": "system", "content": "", "tools": [*tools]}] if tools else []
