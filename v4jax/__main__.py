"""The `v4jax` command."""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from v4jax.commands import chat, command_line, generate, help_texts, launch, options, plan

# Commands import JAX, Flax and Orbax only when they need them, so that `--help` is instant.

_SOURCE = "a Hugging Face directory, a native checkpoint, a URL of either, or a Hub id"
_RELEASE = "a Hugging Face directory, a Hub id, or 'tiny'"
_TARGET = "directory to create"
_BEST = "use a run's best state by evaluation instead of its newest"
_STATE = "use a run's state after this step instead of its newest"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      The exit status: 0 for done, 1 for failed. Misuse raises SystemExit(2), as argparse does.
    """
    with command_line.process("v4jax"):
        args = _parser().parse_args(argv)
        return command_line.status(
            f"v4jax {args.command}",
            lambda: args.run(args),
            interrupted=".",
            out_of_memory="'v4jax inspect' shows what the model needs.",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="v4jax",
        description="DeepSeek-V4 in JAX: inspect, convert, merge, plan and run its checkpoints.",
        epilog=help_texts.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"v4jax {importlib.metadata.version('v4jax')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_inspect(commands)
    _add_plan(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_export_adapter(commands)
    _add_merge(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_launch(commands)
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
    text = "generate text with the small model that ships with v4jax"
    parser = _command(commands, "demo", _demo, text, help_texts.DEMO)
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="copy the model to this directory first"
    )
    options.add_no_cache(parser)


def _add_inspect(commands: Any) -> None:
    from v4jax import presets

    text = "show a checkpoint's layers, parameters, bytes, cache, and the devices it needs"
    more = help_texts.INSPECT.format(presets=", ".join(presets.names()))
    parser = _command(commands, "inspect", _inspect, text, more)
    parser.add_argument("path", help=f"{_SOURCE}; a config.json; or a preset")
    parser.add_argument(
        "--kernels",
        choices=("v5p", "v6e", "tpu7x", "h200"),
        help="list instead which operations run as Pallas kernels on this chip, and why the others "
        "do not",
    )
    options.add_revision(parser)


def _add_plan(commands: Any) -> None:
    text = "show what a job takes on a slice of TPUs: memory, work, communication, time"
    parser = _command(commands, "plan", plan.run, text, plan.EPILOG)
    parser.add_argument("path", metavar="PATH", help=f"{_SOURCE}; a config.json; or a preset")
    plan.add_options(parser)


def _add_convert(commands: Any) -> None:
    text = "convert a Hugging Face checkpoint to a native one"
    parser = _command(commands, "convert", _convert, text, help_texts.CONVERT)
    parser.add_argument("source", help=f"{_RELEASE}; or the URL of one")
    parser.add_argument("target", type=Path, help=_TARGET)
    parser.add_argument(
        "--weights",
        choices=("keep", "bfloat16", "float32"),
        default="keep",
        help="keep FP8 and FP4 weights quantised (default), or dequantise everything to one dtype",
    )
    options.add_revision(parser)
    options.add_processes(parser)


def _add_export(commands: Any) -> None:
    text = "convert a native checkpoint back to a Hugging Face one"
    parser = _command(commands, "export", _export, text, help_texts.EXPORT)
    parser.add_argument("source", help="a native checkpoint, or the Hub id of one")
    parser.add_argument("target", type=Path, help=_TARGET)
    options.add_revision(parser)
    options.add_processes(parser)


def _add_export_adapter(commands: Any) -> None:
    text = "write a training run's adapter in the format of Hugging Face's PEFT"
    parser = _command(commands, "export-adapter", _export_adapter, text, help_texts.EXPORT_ADAPTER)
    parser.add_argument(
        "run_directory", type=Path, metavar="RUN", help="directory of a training run"
    )
    parser.add_argument("target", type=Path, metavar="ADAPTER", help=_TARGET)
    parser.add_argument(
        "--model", metavar="PATH", help=f"the run's model, if it has moved: {_SOURCE}"
    )
    _add_state(parser)


def _add_merge(commands: Any) -> None:
    text = "write a release with the update of a training run or an adapter merged in"
    parser = _command(commands, "merge", _merge, text, help_texts.MERGE)
    parser.add_argument("source", metavar="RELEASE", help=_RELEASE)
    change = "a training run, a PEFT adapter, or the Hub id of an adapter"
    parser.add_argument("change", metavar="CHANGE", help=change)
    parser.add_argument("target", type=Path, metavar="TARGET", help=_TARGET)
    parser.add_argument(
        "--weights",
        choices=("bfloat16", "keep"),
        required=True,
        help="dequantise all weights, or keep each in its original format",
    )
    options.add_revision(parser)
    _add_state(parser)


def _add_state(parser: argparse.ArgumentParser) -> None:
    """Add the options that select a state of a run."""
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--best", action="store_true", help=_BEST)
    state.add_argument("--state", type=options.integer(1), metavar="STEP", help=_STATE)


def _add_generate(commands: Any) -> None:
    text = "continue a text, or answer in a chat"
    parser = _command(commands, "generate", generate.run, text, help_texts.GENERATE)
    parser.add_argument("path", help=_SOURCE)
    generate.add_options(parser)


def _add_chat(commands: Any) -> None:
    text = "hold a conversation in the terminal"
    parser = _command(commands, "chat", chat.run, text, chat.EPILOG)
    parser.add_argument("path", help=_SOURCE)
    chat.add_options(parser)


def _add_launch(commands: Any) -> None:
    text = "launch a training run on the hosts of TPU slices or of GPU nodes"
    launch.add_options(_command(commands, "launch", launch.run, text, launch.EPILOG))


def _demo(args: argparse.Namespace) -> int:
    from v4jax.commands import demo

    return demo.main(args.directory)


def _inspect(args: argparse.Namespace) -> int:
    from v4jax.commands import inspect

    subject = inspect.find(args.path, revision=args.revision)
    if args.kernels is not None:
        from v4jax.commands import kernels

        kernels.show(subject.config, args.kernels)
    else:
        inspect.show(subject.config, what=subject.what, held=subject.held)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from v4jax.checkpoints import convert

    options.join_processes(args)
    convert.convert(args.source, args.target, weights=args.weights, revision=args.revision)
    return _wrote(args)


def _export(args: argparse.Namespace) -> int:
    from v4jax.checkpoints import convert

    options.join_processes(args)
    convert.export(args.source, args.target, revision=args.revision)
    return _wrote(args)


def _wrote(args: argparse.Namespace) -> int:
    from v4jax.checkpoints.hosts import all_processes

    if all_processes().index == 0:
        print(f"Wrote {args.target}.")
    return 0


def _export_adapter(args: argparse.Namespace) -> int:
    from v4jax.adapters import updates

    run = options.run_state(args.run_directory, args.state)
    updates.export_adapter(Path(run), args.target, model=args.model, best=args.best)
    print(f"Wrote {args.target}.")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from v4jax.adapters import merge, requantise

    rows = merge.merge(
        *(args.source, options.run_state(args.change, args.state), args.target),
        weights=args.weights,
        best=args.best,
        revision=args.revision,
    )
    for line in requantise.table(rows):
        print(line)
    print(f"Wrote {args.target}.")
    sys.stdout.flush()
    for line in requantise.warnings(rows):
        command_line.say(f"v4jax merge: warning: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
