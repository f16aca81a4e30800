"""The `v4jax` command."""

import argparse
import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4jax.commands import command_line, help_texts, options

if TYPE_CHECKING:
    from v4jax.model.config import ModelConfig

# JAX, Flax and Orbax are imported by the command that needs them: `--help` answers at once.

_SOURCE = "a Hugging Face directory, a native checkpoint, or a Hub id"
_BEST = "of a run, the state that evaluations found best, not the newest"
_STATE = "of a run, the state of this step"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      The exit status: 0 done, 1 failed. Misuse raises SystemExit with 2, as argparse does.
    """
    with command_line.process("v4jax"):
        args = _parser().parse_args(argv)
        return command_line.status(
            f"v4jax {args.command}",
            lambda: args.run(args),
            interrupted=".",
            out_of_memory="'v4jax inspect' says what the model needs.",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="v4jax",
        description="DeepSeek-V4 in JAX: look at, convert and run its checkpoints.",
        epilog=help_texts.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"v4jax {importlib.metadata.version('v4jax')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_export_adapter(commands)
    _add_merge(commands)
    _add_generate(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[..., int], text: str, more: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_demo(commands: Any) -> None:
    text = "generate from the small model that comes with v4jax"
    parser = _command(commands, "demo", _demo, text, help_texts.DEMO)
    parser.add_argument("--directory", type=Path, metavar="DIR", help="copy it here first")


def _add_inspect(commands: Any) -> None:
    from v4jax.presets import preset_names

    text = "say what a checkpoint is: layers, parameters, bytes, cache, and what it fits on"
    more = help_texts.INSPECT.format(presets=", ".join(preset_names()))
    parser = _command(commands, "inspect", _inspect, text, more)
    parser.add_argument("path", help=f"{_SOURCE}; a config.json; or a preset")


def _add_convert(commands: Any) -> None:
    text = "turn a Hugging Face checkpoint into a native one"
    parser = _command(commands, "convert", _convert, text, help_texts.CONVERT)
    parser.add_argument("source", help="a Hugging Face directory, a Hub id, or 'tiny'")
    parser.add_argument("target", type=Path, help="the directory to make")
    parser.add_argument(
        "--weights",
        choices=("keep", "bfloat16", "float32"),
        default="keep",
        help="keep FP8 and FP4 as they are (default), or decode everything to one dtype",
    )


def _add_export(commands: Any) -> None:
    text = "turn a native checkpoint back into a Hugging Face one"
    parser = _command(commands, "export", _export, text, help_texts.EXPORT)
    parser.add_argument("source", help="a native checkpoint, or a Hub id of one")
    parser.add_argument("target", type=Path, help="the directory to make")


def _add_export_adapter(commands: Any) -> None:
    text = "write a training run's adapter for Hugging Face's PEFT"
    parser = _command(commands, "export-adapter", _export_adapter, text, help_texts.EXPORT_ADAPTER)
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="a training run")
    parser.add_argument("target", type=Path, metavar="ADAPTER", help="the directory to make")
    parser.add_argument("--model", metavar="PATH", help=f"its model, where it moved: {_SOURCE}")
    _add_state(parser)


def _add_merge(commands: Any) -> None:
    text = "make a release with a training run's or an adapter's change in it"
    parser = _command(commands, "merge", _merge, text, help_texts.MERGE)
    release = "a Hugging Face directory, a Hub id, or 'tiny'"
    parser.add_argument("source", metavar="RELEASE", help=release)
    change = "a run, a PEFT adapter, or a Hub id of one"
    parser.add_argument("change", metavar="CHANGE", help=change)
    parser.add_argument("target", type=Path, metavar="TARGET", help="the directory to make")
    parser.add_argument(
        "--weights",
        choices=("bfloat16", "keep"),
        required=True,
        help="all dense, or each in the format that it has",
    )
    _add_state(parser)


def _add_state(parser: argparse.ArgumentParser) -> None:
    """Which state of a run, where it is not the newest."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help=_BEST)
    which.add_argument("--state", type=options.whole(1), metavar="STEP", help=_STATE)


def _add_generate(commands: Any) -> None:
    text = "continue a text, or answer in a chat"
    parser = _command(commands, "generate", _generate, text, help_texts.GENERATE)
    add = parser.add_argument
    add("path", help=_SOURCE)
    add(
        *("-p", "--prompt"),
        required=True,
        metavar="TEXT",
        help="the text; - reads standard input, without the line break at its end",
    )
    add(
        "--max-tokens",
        type=options.whole(1),
        default=256,
        metavar="N",
        help="most new tokens (256)",
    )
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the text as it comes (default: on a terminal)",
    )
    options.add_chat_options(parser.add_argument_group("chat"))
    options.add_sampling_options(parser.add_argument_group("sampling"))
    options.add_running_options(parser.add_argument_group("running"))


def _demo(args: argparse.Namespace) -> int:
    from v4jax.commands import demo

    return demo.main(args.directory)


def _inspect(args: argparse.Namespace) -> int:
    from v4jax.commands import inspect

    subject = inspect.find(args.path)
    inspect.show(subject.config, what=subject.what, held=subject.held)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from v4jax.checkpoints import convert

    with _progress() as progress:
        convert.convert(args.source, args.target, weights=args.weights, progress=progress)
    print(f"Made {args.target}.")
    return 0


def _export(args: argparse.Namespace) -> int:
    from v4jax.checkpoints import convert

    with _progress() as progress:
        convert.export(args.source, args.target, progress=progress)
    print(f"Made {args.target}.")
    return 0


def _export_adapter(args: argparse.Namespace) -> int:
    from v4jax.adapters import updates

    run = _state(args.run_directory, args.state)
    updates.export_adapter(run, args.target, model=args.model, best=args.best)
    print(f"Made {args.target}.")
    return 0


def _state(run: str | Path | None, step: int | None) -> Path:
    """The path of a run, or of the state of a step."""
    from v4jax.adapters.runs import STATES

    if run is None:
        raise ValueError("--state is of a training run; name one by --adapter.")
    return Path(run) if step is None else Path(run) / STATES / str(step)


def _merge(args: argparse.Namespace) -> int:
    from v4jax.adapters import merge, requantise

    with _progress() as progress:
        rows = merge.merge(
            *(args.source, _state(args.change, args.state), args.target),
            weights=args.weights,
            best=args.best,
            progress=progress,
        )
    for line in requantise.table(rows):
        print(line)
    print(f"Made {args.target}.")
    sys.stdout.flush()
    for line in requantise.warnings(rows):
        command_line.say(f"v4jax merge: warning: {line}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    import v4jax
    from v4jax.checkpoints import hub
    from v4jax.checkpoints.open_checkpoint import open_checkpoint
    from v4jax.model import sharding

    chat = args.chat or args.system is not None or args.thinking != "off"
    prompt = _read_prompt() if args.prompt == "-" else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty; give a text.")
    directory = hub.resolve(args.path)
    # Loading takes minutes: what can be told before is told before.
    if (directory / "config.json").is_file() and not (directory / "tokenizer.json").is_file():
        raise ValueError(f"{directory}: has no tokenizer.json; copy it there from the release.")
    if chat:
        prompt = _chat_prompt(prompt, args, open_checkpoint(directory).config)
    mesh = None if args.mesh is None else sharding.read_mesh(args.mesh)
    with _progress() as progress:
        model = v4jax.load(
            directory,
            dtype=args.dtype,
            numerics=args.numerics,
            keep_quantised=args.keep_quantised,
            adapter=args.adapter if args.state is None else _state(args.adapter, args.state),
            mesh=mesh,
            progress=progress,
        )
    settings = {key: getattr(args, key) for key in ("temperature", "top_p", "top_k", "seed")}
    if sys.stdout.isatty() if args.stream is None else args.stream:
        for piece in model.stream(prompt, max_tokens=args.max_tokens, **settings):
            print(piece, end="", flush=True)
        print()
    else:
        print(model.generate(prompt, max_tokens=args.max_tokens, **settings).text)
    return 0


def _read_prompt() -> str:
    try:
        return sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is no text in {error.encoding}.") from error


def _chat_prompt(text: str, args: argparse.Namespace, cfg: "ModelConfig") -> str:
    from v4jax.text.chat import EFFORTS, encode_chat

    system = [{"role": "system", "content": args.system}] if args.system else []
    messages = [*system, {"role": "user", "content": text}]
    revision = "0731" if cfg.dspark else "april"
    if args.thinking == "off":
        return encode_chat(messages, "chat", revision=revision)
    efforts = [effort for effort in EFFORTS[revision] if effort]
    if args.thinking not in efforts:
        raise ValueError(
            f"--thinking {args.thinking}: this checkpoint, of revision {revision}, knows no such "
            f"effort; use one of {', '.join(efforts)}."
        )
    return encode_chat(messages, "thinking", args.thinking, revision=revision)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on a terminal: the callback takes what is done, how much, and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


if __name__ == "__main__":
    sys.exit(main())
