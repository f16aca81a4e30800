"""The `v4jax` command."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from v4jax.config import ModelConfig
    from v4jax.language_model import LanguageModel

# JAX, Flax and Orbax are imported by the command that needs them: `--help` answers at once.

_EPILOG = """\
exit status: 0 done, 1 failed, 2 misuse.

examples:
  v4jax inspect flash
  v4jax convert deepseek-ai/DeepSeek-V4-Flash flash-native --weights keep
  v4jax generate flash-native --chat -p "Why is the sky blue?" --thinking high
  v4jax export flash-native flash-hf
  v4jax demo
"""
_SOURCE = "a Hugging Face directory, a native checkpoint, or a Hub id such as deepseek-ai/DeepSeek-V4-Flash"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"v4jax {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"v4jax {args.command}: interrupted", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="v4jax",
        description="DeepSeek-V4 in JAX: look at, convert and run its checkpoints.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_generate(commands)
    _add_demo(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands, "inspect", _inspect, "say what a checkpoint is: layers, parameters, bytes, cache, fit"
    )
    parser.add_argument("path", help=f"{_SOURCE}; a config.json; or a preset's name")


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands, "convert", _convert, "turn a Hugging Face checkpoint into a native one"
    )
    parser.add_argument("source", help="a Hugging Face directory or a Hub id")
    parser.add_argument("target", type=Path, help="directory to make; an interrupted run resumes")
    parser.add_argument(
        "--weights",
        choices=("keep", "bfloat16", "float32"),
        default="keep",
        help="keep FP8 and FP4 as they are (default), or dequantise to one dtype",
    )


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", _export, "turn a native checkpoint back into a Hugging Face one"
    )
    parser.add_argument("source", type=Path, help="a native checkpoint made with --weights keep")
    parser.add_argument("target", type=Path, help="directory to make")


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", _generate, "continue a text, or answer in a chat")
    parser.add_argument("path", help=_SOURCE)
    parser.add_argument("-p", "--prompt", required=True, help="the text; - reads standard input")
    chat = parser.add_argument_group("chat")
    chat.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    chat.add_argument("--system", help="a system message before it (implies --chat)")
    chat.add_argument(
        "--thinking",
        choices=("off", "low", "high", "max"),
        default="off",
        help="reason before answering, and how hard (implies --chat unless off)",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=_at_least(int, 1), default=256, metavar="N")
    sampling.add_argument("--temperature", type=_at_least(float, 0), default=1.0, metavar="X", help="0 is greedy; default 1")
    sampling.add_argument("--top-p", type=_at_least(float, 0), default=1.0, metavar="X")
    sampling.add_argument("--top-k", type=_at_least(int, 0), default=0, metavar="N", help="0 is off")
    sampling.add_argument("--seed", type=_at_least(int, 0), metavar="N", help="the same seed, the same text")
    run = parser.add_argument_group("running")
    run.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the text as it comes (default on a terminal)",
    )
    run.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of activations")
    run.add_argument("--numerics", choices=("official", "hf"), default="official", help="DeepSeek's rounding, or transformers'")
    run.add_argument("--keep", action="store_true", help="hold FP8 and FP4 weights as they are")


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", _demo, "make a small random checkpoint in the release format and run it"
    )
    parser.add_argument("--directory", type=Path, help="where to make it (default: a temporary one)")


def _at_least(kind: type, least: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {least} or more")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def _inspect(args: argparse.Namespace) -> int:
    from v4jax import inspect

    inspect.show(inspect.config_of(args.path))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from v4jax import convert

    with _progress() as progress:
        convert.convert(args.source, args.target, weights=args.weights, progress=progress)
    print(f"Made {args.target}.")
    return 0


def _export(args: argparse.Namespace) -> int:
    from v4jax import convert

    with _progress() as progress:
        convert.export(args.source, args.target, progress=progress)
    print(f"Made {args.target}.")
    return 0


def _generate(args: argparse.Namespace) -> int:
    import v4jax

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with _progress() as progress:
        model = v4jax.load(
            args.path, dtype=args.dtype, numerics=args.numerics, keep=args.keep, progress=progress
        )
    if args.chat or args.system or args.thinking != "off":
        prompt = _chat_prompt(prompt, args, model.config)
    settings = {key: getattr(args, key) for key in ("temperature", "top_p", "top_k", "seed")}
    if sys.stdout.isatty() if args.stream is None else args.stream:
        for piece in model.stream(prompt, max_tokens=args.max_tokens, **settings):
            print(piece, end="", flush=True)
        print()
    else:
        print(model.generate(prompt, max_tokens=args.max_tokens, **settings).text)
    return 0


def _chat_prompt(text: str, args: argparse.Namespace, cfg: "ModelConfig") -> str:
    from v4jax.chat import encode_chat

    system = [{"role": "system", "content": args.system}] if args.system else []
    messages = [*system, {"role": "user", "content": text}]
    if args.thinking == "off":
        return encode_chat(messages, "chat", revision="0731" if cfg.dspark else "april")
    if cfg.dspark:
        return encode_chat(messages, "thinking", reasoning_effort=args.thinking, revision="0731")
    # The April checkpoints know no level below high.
    effort = "max" if args.thinking == "max" else None
    return encode_chat(messages, "thinking", reasoning_effort=effort, revision="april")


def _demo(args: argparse.Namespace) -> int:
    from v4jax import demo

    return demo.main(args.directory)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error: the callback takes what is done, how much, and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


if __name__ == "__main__":
    sys.exit(main())
