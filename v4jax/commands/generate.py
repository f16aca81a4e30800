"""`v4jax generate`: continue prompts from the command line or a file."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4jax.commands import options
from v4jax.text.files import parse_json, read_text

if TYPE_CHECKING:
    from v4jax.model.config import ModelConfig

_SAMPLING = (
    *("max_tokens", "stop", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)

# Prompts of a file that are answered at once; what was answered before an error is printed.
_TOGETHER = 64
# Each row of a .jsonl file has one of these keys.
_TYPES = {"prompt": str, "messages": list}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all arguments but the checkpoint."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        *("-p", "--prompt"),
        metavar="TEXT",
        help="the prompt; - reads standard input, without its final line break",
    )
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a file with a prompt per line; in a .jsonl file, an object per line with 'prompt' or "
        "'messages'. Implies --json",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the text as it is generated (default: on a terminal)",
    )
    output.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object per prompt: text, tokens, logprobs, finish_reason, timings",
    )
    options.add_chat_options(parser.add_argument_group("chat"))
    options.add_sampling_options(parser.add_argument_group("sampling"))
    running = parser.add_argument_group("running")
    options.add_running_options(running)
    options.add_speculate(running)
    options.add_revision(running)
    options.add_no_cache(running)


def run(args: argparse.Namespace) -> int:
    """Load the model and answer every prompt."""
    from v4jax.checkpoints.open_checkpoint import open_checkpoint

    options.check_state(args)
    prompts = texts = _prompts(args)
    directory = options.directory(args)
    if any(not isinstance(prompt, str) for prompt in prompts):
        cfg = open_checkpoint(directory).config
        texts = [p if isinstance(p, str) else _chat_text(p, args, cfg) for p in prompts]
    model = options.load(args, directory)
    settings = {name: getattr(args, name) for name in _SAMPLING}
    if args.speculate is not None:
        settings["speculate"] = args.speculate
    if args.json or args.prompts is not None:
        for start in range(0, len(texts), _TOGETHER):
            some = slice(start, start + _TOGETHER)
            answers = model.generate(texts[some], **settings)
            for prompt, answer in zip(prompts[some], answers, strict=True):
                fields = dataclasses.asdict(answer)
                del fields["top_logprobs"]
                print(json.dumps({"prompt": prompt, **fields}, ensure_ascii=False), flush=True)
    elif sys.stdout.isatty() if args.stream is None else args.stream:
        for piece in model.stream(texts[0], **settings):
            print(piece, end="", flush=True)
        print()
    else:
        print(model.generate(texts[0], **settings).text)
    return 0


def _prompts(args: argparse.Namespace) -> list[Any]:
    """The prompts: texts to pass to the model, or lists of chat messages to encode.

    Raises:
      ValueError: a prompt is empty, or a line of the file is not a prompt.
    """
    if args.prompts is not None:
        prompts = list(_read_prompts(args.prompts))
    else:
        prompts = [_read_input() if args.prompt == "-" else args.prompt]
    if "" in prompts:
        raise ValueError("the prompt is empty; pass some text.")
    if not (args.chat or args.system is not None or args.thinking != "off"):
        return prompts
    return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]


def _read_prompts(path: Path) -> Iterator[Any]:
    """The prompts in a file: texts, or lists of messages."""
    text = read_text(path).removesuffix("\n")
    if not text:
        raise ValueError(f"{path}: has no prompts; write one per line.")
    for number, line in enumerate(text.split("\n"), 1):
        where, prompt = f"{path}, line {number}", line.removesuffix("\r")
        if path.suffix == ".jsonl":
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{where}: not a JSON object ({error}).") from None
            [(key, prompt)] = row.items() if len(row) == 1 else [("", None)]
            if _TYPES.get(key) is not type(prompt):
                raise ValueError(f"{where}: must have 'prompt', a string, or 'messages', a list.")
        if not prompt:
            raise ValueError(f"{where}: the prompt is empty; pass some text.")
        yield prompt


def _read_input() -> str:
    try:
        return sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not text in {error.encoding}.") from error


def _chat_text(messages: list[Any], args: argparse.Namespace, cfg: "ModelConfig") -> str:
    from v4jax.text.chat import encode_chat

    if args.system:
        messages = [{"role": "system", "content": args.system}, *messages]
    return encode_chat(messages, **options.encoding(args.thinking, cfg))
