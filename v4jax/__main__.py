"""The `v4jax` command."""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from v4jax.commands import command_line, generate, help_texts, options

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
    options.add_no_cache(parser)


def _add_inspect(commands: Any) -> None:
    from v4jax import presets

    text = "say what a checkpoint is: layers, parameters, bytes, cache, and what it fits on"
    more = help_texts.INSPECT.format(presets=", ".join(presets.names()))
    parser = _command(commands, "inspect", _inspect, text, more)
    parser.add_argument("path", help=f"{_SOURCE}; a config.json; or a preset")
    parser.add_argument(
        "--kernels",
        choices=("v5p", "v6e", "tpu7x", "h200"),
        help="list instead which operations run as Pallas kernels on this chip, and why others do "
        "not",
    )
    options.add_revision(parser)


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
    options.add_revision(parser)


def _add_export(commands: Any) -> None:
    text = "turn a native checkpoint back into a Hugging Face one"
    parser = _command(commands, "export", _export, text, help_texts.EXPORT)
    parser.add_argument("source", help="a native checkpoint, or a Hub id of one")
    parser.add_argument("target", type=Path, help="the directory to make")
    options.add_revision(parser)


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
    options.add_revision(parser)
    _add_state(parser)


def _add_state(parser: argparse.ArgumentParser) -> None:
    """Which state of a run, where it is not the newest."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help=_BEST)
    which.add_argument("--state", type=options.whole(1), metavar="STEP", help=_STATE)


def _add_generate(commands: Any) -> None:
    text = "continue a text, or answer in a chat"
    parser = _command(commands, "generate", generate.run, text, help_texts.GENERATE)
    parser.add_argument("path", help=_SOURCE)
    generate.add_options(parser)


def _demo(args: argparse.Namespace) -> int:
    from v4jax.commands import demo

    options.apply_no_cache(args)
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
    from v4jax import waiting
    from v4jax.checkpoints import convert

    with waiting.progress() as progress:
        convert.convert(
            args.source,
            args.target,
            weights=args.weights,
            revision=args.revision,
            progress=progress,
        )
    print(f"Wrote {args.target}.")
    return 0


def _export(args: argparse.Namespace) -> int:
    from v4jax import waiting
    from v4jax.checkpoints import convert

    with waiting.progress() as progress:
        convert.export(args.source, args.target, revision=args.revision, progress=progress)
    print(f"Wrote {args.target}.")
    return 0


def _export_adapter(args: argparse.Namespace) -> int:
    from v4jax.adapters import updates

    run = options.run_state(args.run_directory, args.state)
    updates.export_adapter(run, args.target, model=args.model, best=args.best)
    print(f"Wrote {args.target}.")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from v4jax import waiting
    from v4jax.adapters import merge, requantise

    with waiting.progress() as progress:
        rows = merge.merge(
            *(args.source, options.run_state(args.change, args.state), args.target),
            weights=args.weights,
            best=args.best,
            revision=args.revision,
            progress=progress,
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
