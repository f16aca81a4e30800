"""The `v4jax-train` command."""

import argparse
import dataclasses
import importlib.metadata
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from v4jax.commands import command_line, options

_EPILOG = """\
exit status: 0 done, 1 failed, 2 misuse, 143 saved and ended by SIGTERM.

examples:
  v4jax-train configs/train_lora.toml --model DIR --data chats.jsonl --out runs/a
  v4jax-train preview configs/train_lora.toml --model DIR --data chats.jsonl
  v4jax-train resume runs/a
  v4jax-train eval runs/a
  v4jax-train plot runs/a
  v4jax-train demo
"""
_COMMANDS = ("train", "preview", "resume", "eval", "plot", "demo")
_FINISHED_BY_SIGNAL = 143
# glibc's malloc takes memory in large pages if the environment says so when a process starts.
# XLA takes a step's buffers anew each time; on a CPU that is up to a tenth of the step.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def command() -> int:
    """`main` for the command line, which may end the process.

    On Linux it begins anew with large pages.
    """
    if sys.platform == "linux" and LARGE_PAGES.keys().isdisjoint(os.environ):
        words = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, words, os.environ | LARGE_PAGES)
    status = main()
    if status == 1:
        # Where a state could not be saved, Orbax's unfinished coroutines would complain at the end.
        os._exit(status)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      The exit status. Misuse raises SystemExit with 2, as argparse does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in _COMMANDS:
        words.insert(0, "train")
    with command_line.process("v4jax-train"):
        try:
            args = _parser().parse_args(words)
        except ModuleNotFoundError as error:
            return _missing(error)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        status = command_line.status(
            f"v4jax-train {args.command}",
            lambda: args.run(args),
            interrupted="; 'v4jax-train resume' goes on from the last saved state.",
            out_of_memory="try more steps.parts, a shorter data.seq_len or remat.",
        )
    except ModuleNotFoundError as error:
        status = _missing(error)
    except Exception:
        if not args.among_others:
            raise
        traceback.print_exc()
        status = 1
    if status == 1 and args.among_others:
        # They would wait for this process; when it is gone, they end too.
        os._exit(1)
    return status


def _missing(error: ModuleNotFoundError) -> int:
    extra = "train" if error.name != "tensorboardX" else "tensorboard"
    command_line.say(f"v4jax-train: {error.name} is missing; pip install 'v4jax[{extra}]'")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="v4jax-train",
        description="Fine-tune DeepSeek-V4, or continue its pre-training.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"v4jax {importlib.metadata.version('v4jax')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = _command(commands, "train", _train, "train as a recipe says (the default command)")
    _add_recipe(train)
    _add_processes(train)
    preview = _command(commands, "preview", _preview, "show what a recipe would train on")
    _add_recipe(preview)
    preview.add_argument("--samples", type=int, default=3, metavar="N", help="of each file (3)")
    resume = _command(commands, "resume", _resume, "go on with a run from its newest state")
    _add_run(resume)
    _add_state(resume, "go on from this one, not the newest; what came after it is dropped")
    resume.add_argument(
        "--changed-data",
        action="store_true",
        help="go on though data files are not what the run began with",
    )
    _add_processes(resume)
    evaluate = _command(commands, "eval", _evaluate, "measure a run's newest or best state")
    _add_run(evaluate)
    _add_state(evaluate, "this one, not the newest")
    evaluate.add_argument("--data", action="append", metavar="FILE", help="instead of the recipe's")
    evaluate.add_argument("--best", action="store_true", help="the best state, not the newest")
    plot = _command(commands, "plot", _plot, "draw a run's curves")
    _add_run(plot)
    plot.add_argument("--png", type=Path, help="the file to make (default: RUN/curves.png)")
    demo = _command(
        commands, "demo", _demo, "train a tiny model from nothing, on CPython's own text"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("runs/tiny"), metavar="DIR", help="(runs/tiny)"
    )
    demo.add_argument("--steps", metavar="N", help="instead of the recipe's")
    return parser


def _command(
    commands: Any, name: str, run: Callable[..., int], text: str
) -> argparse.ArgumentParser:
    description = text[0].upper() + text[1:] + "."
    parser = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
    parser.set_defaults(run=run, among_others=False)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="RUN", help="the directory of a run")


def _add_state(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--state", type=options.whole(1), metavar="STEP", help=text)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe, and a flag for each of its fields."""
    from .recipe import Recipe

    parser.add_argument("recipe", type=Path, help="a TOML file")
    parser.add_argument("--model", dest="model.path", metavar="DIR", help="same as --model.path")
    parser.add_argument(
        "--data", action="append", metavar="FILE", help="train on this; may be repeated"
    )
    parser.add_argument("--out", metavar="DIR", help="the directory of the run")
    group = parser.add_argument_group("fields of the recipe")
    for table, hint in get_type_hints(Recipe).items():
        for name in _fields(hint):
            group.add_argument(f"--{table}.{name}", metavar="X")


def _fields(hint: Any) -> list[str]:
    kinds = (hint, *getattr(hint, "__args__", ()))
    kind = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    return [field.name for field in dataclasses.fields(kind)] if kind else []


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed", action="store_true", help="one process of a pod that JAX knows of"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, elsewhere")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which this is, from 0")


def _begin_processes(args: argparse.Namespace) -> None:
    import jax

    chosen = (args.coordinator, args.processes, args.process)
    if any(x is not None for x in chosen):
        if None in chosen:
            raise ValueError("--coordinator, --processes and --process go together.")
        jax.distributed.initialize(*chosen)
    elif args.distributed:
        jax.distributed.initialize()
    args.among_others = jax.process_count() > 1


def _recipe(args: argparse.Namespace) -> Any:
    from .recipe import read

    given = {name: value for name, value in vars(args).items() if "." in name and value is not None}
    if args.out is not None:
        given["out"] = repr(args.out)
    if args.data:
        given["data.files"] = repr(args.data)
    return read(args.recipe, given)


def _quiet_orbax() -> None:
    """When it is imported: it logs what options mean, and tracebacks of errors that it raises."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _told_to_nobody


def _told_to_nobody(unraisable: Any) -> None:
    """As Python's, but for writes that end when a save has failed and nobody listens."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _train(args: argparse.Namespace) -> int:
    from . import display, loop

    _quiet_orbax()
    recipe = _recipe(args)
    _begin_processes(args)
    with display.live() as show:
        outcome = loop.begin(recipe, show=show)
    return _ended(outcome, Path(recipe.out))


def _resume(args: argparse.Namespace) -> int:
    from . import display, loop

    _quiet_orbax()
    _begin_processes(args)
    with display.live() as show:
        outcome = loop.resume(
            args.directory, show=show, step=args.state, changed_data=args.changed_data
        )
    return _ended(outcome, args.directory)


def _ended(outcome: Any, directory: Path) -> int:
    if outcome.why == "signal":
        print(f"Saved {directory} after step {outcome.step}; 'v4jax-train resume' goes on.")
        return _FINISHED_BY_SIGNAL
    early = " early: evaluations do not get better" if outcome.why == "early" else ""
    print(f"Ended{early} after step {outcome.step}, loss {outcome.loss:.4f}: {directory}.")
    return 0


def _preview(args: argparse.Namespace) -> int:
    from rich.console import Console

    from . import preview

    preview.show(_recipe(args), Console(), samples=args.samples)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    import json

    from . import runs

    _quiet_orbax()
    found = runs.evaluate(
        args.directory, files=tuple(args.data or ()), best=args.best, step=args.state
    )
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 0


def _plot(args: argparse.Namespace) -> int:
    from . import plot

    target = args.png or args.directory / "curves.png"
    plot.draw([args.directory], target)
    print(f"Made {target}.")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from . import display, journal, tiny

    _quiet_orbax()
    run = args.out / "run"
    overrides = {} if args.steps is None else {"steps.steps": args.steps}
    with display.live() as show:
        release, outcome = tiny.train(args.out, overrides, show=show)
    status = _ended(outcome, run)
    if not status:
        measured = journal.read(run, "evaluation")[-1]
        for sample in measured["samples"]:
            print(f"\n{sample['prompt']}{sample['text']}")
        print(
            f"\nOn text held out: loss {measured['loss']:.3f};"
            f" MTP foresees {measured['mtp_agreement']:.0%} of the tokens."
        )
        print(f'Go on with: v4jax generate {release} -p "{tiny.PROMPTS[0]}"')
    return status


if __name__ == "__main__":
    sys.exit(command())
