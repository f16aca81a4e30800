"""The `v4jax-train` command."""

import argparse
import importlib.metadata
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from v4jax.commands import command_line, options

_EPILOG = """\
'v4jax-train train --help' describes every field of a recipe.

exit status: 0 done, 1 failed, 2 misuse, 124 no progress, 143 saved and ended by SIGTERM.

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
_SECONDS_TO_EXPLAIN = 3
# glibc's malloc uses large pages only if the environment says so when the process starts. XLA
# allocates a step's buffers again each time; on a CPU that is up to a tenth of the step.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def command() -> int:
    """`main` for the command line, which may end the process.

    On Linux it restarts the process with large pages.
    """
    if sys.platform == "linux" and LARGE_PAGES.keys().isdisjoint(os.environ):
        words = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, words, os.environ | LARGE_PAGES)
    status = main()
    if status == 1:
        # If a state could not be saved, Orbax's unfinished coroutines would complain at exit.
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
            interrupted="; 'v4jax-train resume' continues from the last saved state.",
            out_of_memory="try more steps.parts, a shorter data.seq_len or remat.",
        )
    except ModuleNotFoundError as error:
        status = _missing(error)
    except Exception:
        if not args.has_peers:
            raise
        # If the cause is the end of another process, that says so, and ends this one first.
        time.sleep(_SECONDS_TO_EXPLAIN)
        traceback.print_exc()
        status = 1
    if not args.has_peers:
        return status
    if status == 1:
        # The other processes would wait for this one; once it is gone, they end too.
        os._exit(1)
    from . import processes

    processes.leave()
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
    train = _command(commands, "train", _train, "train with a recipe (the default command)")
    _add_recipe(train)
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out if it has begun, as launchers need that start it again",
    )
    options.add_processes(train)
    preview = _command(commands, "preview", _preview, "show what a recipe would train on")
    _add_recipe(preview)
    preview.add_argument(
        "--samples", type=int, default=3, metavar="N", help="rows to show per file (default: 3)"
    )
    resume = _command(commands, "resume", _resume, "continue a run from its newest state")
    _add_run(resume)
    _add_state(resume, "continue from this state instead; later ones are dropped")
    resume.add_argument(
        "--changed-data",
        action="store_true",
        help="continue even if the data files have changed since the run began",
    )
    options.add_processes(resume)
    evaluate = _command(commands, "eval", _evaluate, "evaluate a run's newest or best state")
    _add_run(evaluate)
    _add_state(evaluate, "evaluate this state instead of the newest")
    evaluate.add_argument(
        "--data", action="append", metavar="FILE", help="use this file instead of the recipe's"
    )
    evaluate.add_argument("--best", action="store_true", help="the best state, not the newest")
    plot = _command(commands, "plot", _plot, "plot a run's curves")
    _add_run(plot)
    plot.add_argument("--png", type=Path, help="output file (default: RUN/curves.png)")
    demo = _command(
        commands, "demo", _demo, "train a tiny model from scratch, on CPython's own text"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/tiny"),
        metavar="DIR",
        help="output directory (default: runs/tiny)",
    )
    demo.add_argument("--steps", metavar="N", help="number of steps instead of the recipe's")
    for compiles in (train, resume, evaluate, demo):
        options.add_no_cache(compiles)
    return parser


def _command(
    commands: Any, name: str, run: Callable[..., int], text: str
) -> argparse.ArgumentParser:
    description = text[0].upper() + text[1:] + "."
    parser = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
    parser.set_defaults(run=run, has_peers=False)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="RUN", help="directory of a run")


def _add_state(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--state", type=options.integer(1), metavar="STEP", help=text)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, and a flag for each of its fields."""
    from . import recipe_help
    from .recipe import Recipe

    parser.formatter_class = _field_formatter
    parser.usage = "%(prog)s RECIPE [options] [--TABLE.FIELD VALUE ...]"
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    parser.add_argument("--model", dest="model.path", metavar="DIR", help="same as --model.path")
    parser.add_argument(
        "--data", action="append", metavar="FILE", help="file to train on; may be repeated"
    )
    # The former name of --model.keep_quantised, read with a warning.
    parser.add_argument("--model.keep", help=argparse.SUPPRESS)
    text = "sizes of the mesh's axes, such as fsdp=8,expert=4, or auto: as 'v4jax plan' chooses"
    parser.add_argument("--mesh", metavar="SIZES", help=text)
    out = recipe_help.attributes(Recipe).get("out", "")
    parser.add_argument("--out", metavar="DIR", help=out.rstrip("."))
    parser.epilog = (
        "Fields are keys of the recipe's tables; a flag overrides the file. Values are written as"
        """ in TOML, strings without quotes: --data.files '["a.jsonl", "b.jsonl"]'."""
    )
    for table, kind in recipe_help.tables(Recipe).items():
        group = parser.add_argument_group(f"[{table}]", recipe_help.summary(kind))
        for field in recipe_help.fields(kind):
            text = f"{field.meaning.rstrip('.')} (default: {field.default})".replace("%", "%%")
            group.add_argument(f"--{table}.{field.name}", metavar=field.type, help=text)


def _field_formatter(prog: str) -> argparse.HelpFormatter:
    """Help texts below long option names, on lines of at most 100 columns."""
    width = min(shutil.get_terminal_size().columns, 102) - 2
    return argparse.HelpFormatter(prog, max_help_position=8, width=width)


def _begin_processes(args: argparse.Namespace) -> None:
    import jax

    from . import processes

    options.join_processes(args, processes.join)
    args.has_peers = jax.process_count() > 1


def _recipe(args: argparse.Namespace) -> Any:
    from .recipe import read

    flags = {name: value for name, value in vars(args).items() if "." in name and value is not None}
    if args.out is not None:
        flags["out"] = repr(args.out)
    if args.data:
        flags["data.files"] = repr(args.data)
    return read(args.recipe, flags)


def _with_mesh(recipe: Any, text: str) -> Any:
    """The recipe with the mesh that --mesh names, which is printed if it was chosen."""
    import jax

    from v4jax.pods import mesh_search

    from . import plan

    devices = jax.device_count()
    if text != "auto":
        return plan.with_mesh(recipe, mesh_search.read(text, devices))
    sizes = plan.mesh_for(recipe)
    if not jax.process_index():
        command_line.say(f"mesh {mesh_search.named(sizes)} for {devices} devices")
    return plan.with_mesh(recipe, sizes)


def _quiet_orbax() -> None:
    """Silence Orbax, which logs explanations of options and tracebacks of errors that it raises."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable_hook


def _unraisable_hook(unraisable: Any) -> None:
    """Python's hook, except for Orbax's pending writes after a failed save."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _train(args: argparse.Namespace) -> int:
    from . import display, loop

    _quiet_orbax()
    recipe = _recipe(args)
    _begin_processes(args)
    if args.mesh is not None:
        recipe = _with_mesh(recipe, args.mesh)
    with display.live() as show:
        outcome = loop.begin(recipe, show=show, again=args.resume)
    return _report_end(outcome, Path(recipe.out))


def _resume(args: argparse.Namespace) -> int:
    from . import display, loop

    _quiet_orbax()
    _begin_processes(args)
    with display.live() as show:
        outcome = loop.resume(
            args.directory, show=show, step=args.state, changed_data=args.changed_data
        )
    return _report_end(outcome, args.directory)


def _report_end(outcome: Any, directory: Path) -> int:
    import jax

    from . import goodput

    if jax.process_index() == 0:
        print(goodput.text(goodput.read(directory)))
    if outcome.why == "signal":
        print(f"Saved {directory} after step {outcome.step}; 'v4jax-train resume' continues it.")
        return _FINISHED_BY_SIGNAL
    early = " early: evaluations have stopped improving" if outcome.why == "early" else ""
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
    metrics = runs.evaluate(
        args.directory, files=tuple(args.data or ()), best=args.best, step=args.state
    )
    print(json.dumps(metrics, indent=1, ensure_ascii=False))
    return 0


def _plot(args: argparse.Namespace) -> int:
    from . import goodput, plot

    target = args.png or args.directory / "curves.png"
    plot.draw([args.directory], target)
    if seconds := goodput.read(args.directory):
        print(goodput.text(seconds))
    print(f"Wrote {target}.")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from . import display, journal, tiny

    _quiet_orbax()
    run = args.out / "run"
    overrides = {} if args.steps is None else {"steps.steps": args.steps}
    with display.live() as show:
        release, outcome = tiny.train(args.out, overrides, show=show)
    status = _report_end(outcome, run)
    if not status:
        evaluation = journal.read(run, "evaluation")[-1]
        for sample in evaluation["samples"]:
            print(f"\n{sample['prompt']}{sample['text']}")
        print(
            f"\nOn held-out text: loss {evaluation['loss']:.3f};"
            f" MTP predicts {evaluation['mtp_agreement']:.0%} of the tokens."
        )
        print(f'Next: v4jax generate {release} -p "{tiny.PROMPTS[0]}"')
    return status


if __name__ == "__main__":
    sys.exit(command())
