"""`v4jax chat`: a conversation in the terminal."""

import argparse
import contextlib
import itertools
import json
import os
import queue
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4jax.commands import command_line, options

if TYPE_CHECKING:
    from v4jax.engine.engine import Engine
    from v4jax.engine.request import Event, Request, Usage
    from v4jax.language_model import LanguageModel
    from v4jax.text.chat_parser import Event as Part
    from v4jax.text.reader import Reader

_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
EPILOG = """\
Each answer is computed from where the conversation before it ended. Ctrl+C stops an answer; /help,
entered in the conversation, lists its commands. Messages can also be piped in, one a line. Answers
go to stdout; what they cost, to stderr.

examples:
  v4jax chat tiny
  v4jax chat path/to/checkpoint --thinking high --max-tokens 4096 --speculate mtp:2
"""
_HELP = """\
/reset      forget the conversation
/save FILE  write its messages to a file, as JSON
/help       show this
/exit       end; so does Ctrl+D
Ctrl+C stops an answer. A message that begins with / needs a blank before it."""
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_FINISHES = {
    "length": "cut off after --max-tokens or at the end of the context",
    "abort": "stopped",
    "overload": "ended early: memory ran out",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all arguments but the checkpoint."""
    chat = parser.add_argument_group("chat")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument(
        "--thinking",
        choices=("off", "low", "high", "max"),
        default="off",
        help="reasoning effort before each answer (default: off); checkpoints before 0731 do not "
        "support low",
    )
    chat.add_argument(
        "--context",
        type=options.integer(1),
        metavar="N",
        help="most tokens of the conversation (default: 65536, or the model's own)",
    )
    options.add_sampling_options(parser.add_argument_group("sampling"))
    running = parser.add_argument_group("running")
    options.add_running_options(running)
    options.add_speculate(running)
    options.add_revision(running)
    options.add_no_cache(running)


def run(args: argparse.Namespace) -> int:
    """Load the model and answer until the user ends the conversation."""
    from v4jax.checkpoints.open_checkpoint import open_checkpoint
    from v4jax.engine.engine import Engine

    options.check_state(args)
    directory = options.directory(args)
    encoding = options.encoding(args.thinking, open_checkpoint(directory).config)
    model = options.load(args, directory)
    context = args.context or min(65536, model.config.max_position_embeddings)
    with Engine(model, max_seqs=1, context=context, speculate=args.speculate) as engine:
        conversation = _Conversation(args, model, engine, encoding)
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # `input` then edits lines and recalls earlier ones.
            command_line.say("/help lists the commands.")
        for line in _lines():
            if line == "/exit":
                break
            conversation.take(line)
    return 0


def _lines() -> Iterator[str]:
    """What the user enters, until the end of the input; Ctrl+C begins the line again."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt).rstrip()
        except EOFError:
            sys.stdout.write("\n" if prompt else "")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not text in {error.encoding}.") from error


class _Conversation:
    """The messages so far, and the engine that answers them."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: "LanguageModel",
        engine: "Engine",
        encoding: dict[str, Any],
    ) -> None:
        self._args, self._model, self._engine, self._encoding = args, model, engine, encoding
        self._system = [{"role": "system", "content": args.system}] if args.system else []
        self._messages: list[dict[str, str]] = [*self._system]
        self._is_styled = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def take(self, line: str) -> None:
        """Do what a line says: a command, or a message to answer."""
        command, _, argument = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self._answer(line.removeprefix(" "))
        elif command == "/reset":
            self._messages = [*self._system]
        elif command == "/save" and argument.strip():
            self._save(Path(argument.strip()))
        elif command == "/help":
            sys.stdout.write(f"{_HELP}\n")
        else:
            command_line.say(f"{line}: is not a command; /help lists them.")

    def _save(self, path: Path) -> None:
        try:
            text = json.dumps(self._messages, ensure_ascii=False, indent=2)
            path.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            command_line.say(f"{path}: {error.strerror}.")
        else:
            command_line.say(f"Wrote {path}.")

    def _answer(self, text: str) -> None:
        """Answer a message, and keep both."""
        from v4jax.decoding.sampling import SamplingParams
        from v4jax.engine.request import Request
        from v4jax.text.chat import encode_chat
        from v4jax.text.reader import Watcher

        messages = [*self._messages, {"role": "user", "content": text}]
        assert self._model.tokenizer is not None
        tokens = self._model.tokenizer.encode(encode_chat(messages, **self._encoding))
        context = self._engine.settings.context
        if len(tokens) >= context:
            command_line.say(f"The conversation fills the context of {context} tokens; /reset it.")
            return
        request = Request(
            tokens=tokens,
            max_tokens=min(self._args.max_tokens, context - len(tokens)),
            sampling=SamplingParams(**{name: getattr(self._args, name) for name in _SAMPLING}),
            stop_tokens=self._model.config.eos_token_ids,
            watcher=(lambda: Watcher(self._reader())) if self._args.stop else None,
        )
        self._messages = [*messages, self._show(request)]

    def _reader(self) -> "Reader":
        from v4jax.text.reader import Reader

        assert self._model.tokenizer is not None
        mode = self._encoding.get("thinking_mode", "chat")
        return Reader(self._model.tokenizer, mode, self._args.stop)

    def _show(self, request: "Request") -> dict[str, str]:
        """Show the answer to a request as it arrives; the message that it makes."""
        from v4jax.text.chat_parser import collect

        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket, reader = self._engine.submit(request, events.put), self._reader()
        parts: list[Part] = []
        handler = signal.signal(signal.SIGINT, lambda *_: ticket.cancel())
        try:
            while True:
                event = events.get()
                tokens = [token.id for token in event.tokens if token.id not in request.stop_tokens]
                new = [part for token in tokens for part in reader.push(token)]
                new += reader.finish() if event.finish is not None else []
                self._write(parts[-1] if parts else None, new)
                parts += new
                if event.finish is not None:
                    break
        finally:
            signal.signal(signal.SIGINT, handler)
        sys.stdout.write("\n")
        sys.stdout.flush()
        if event.finish == "error":
            raise ValueError("the logits of the model are not finite, or a step of it failed.")
        command_line.say(self._dim(_costs(event.usage, _FINISHES.get(event.finish, ""))))
        message = collect(parts)
        return {name: message[name] for name in ("role", "content", "reasoning_content")}

    def _write(self, before: "Part | None", parts: Sequence["Part"]) -> None:
        """Write what follows a part: reasoning dimmed, and content apart from it."""
        from v4jax.text.chat_parser import ContentDelta, ReasoningDelta

        for last, part in itertools.pairwise([before, *parts]):
            if isinstance(part, ReasoningDelta):
                sys.stdout.write(self._dim(part.text))
            elif isinstance(part, ContentDelta):
                gap = "\n\n" if isinstance(last, ReasoningDelta) else ""
                sys.stdout.write(gap + part.text)
        sys.stdout.flush()

    def _dim(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._is_styled else text


def _costs(usage: "Usage", note: str) -> str:
    """What an answer has cost, and how it ended."""
    count, seconds = usage.completion_tokens, usage.seconds - usage.first_token_seconds
    speed = [f"{(count - 1) / seconds:.1f} tokens/s"] if count > 1 and seconds > 0 else []
    hit = f"cache hit: {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens"
    drafts = f"drafts accepted: {usage.accepted_tokens} of {usage.drafted_tokens}"
    parts = [f"{count} tokens", *speed, hit, *([drafts] if usage.drafted_tokens else []), note]
    return f"[{', '.join(filter(None, parts))}]"
