"""Options that several commands share, and validation of their values."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from v4jax.cluster import Place
    from v4jax.language_model import LanguageModel
    from v4jax.model.config import ModelConfig

# Tokens of a sequence for which --mesh auto has room, unless the command has an option for them.
_CONTEXT = 65536


def add_chat_options(group: Any) -> None:
    """Add the options that turn a prompt into a conversation."""
    group.add_argument("--chat", action="store_true", help="treat the prompt as a user message")
    group.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    group.add_argument(
        "--thinking",
        choices=("off", "low", "high", "max"),
        default="off",
        help="reasoning effort before the answer (default: off); implies --chat unless off; "
        "checkpoints before 0731 do not support low",
    )


def add_sampling_options(group: Any) -> None:
    """Add the options for the length of a text and for sampling."""
    add = group.add_argument
    number = lambda name, default, allowed, help: add(
        name,
        type=_number(*allowed),
        default=default,
        metavar="X",
        help=f"{help} (default: {default:g})",
    )
    share = "above 0 and at most 1", lambda x: 0 < x <= 1
    penalty = "from -2 to 2", lambda x: -2 <= x <= 2
    add(
        "--max-tokens",
        type=integer(1),
        default=256,
        metavar="N",
        help="maximum number of new tokens (default: 256)",
    )
    stop = "stop before this string; may be repeated"
    add("--stop", action="append", default=[], metavar="TEXT", help=stop)
    top_p = "sample from the most probable tokens with this total probability"
    number(
        "--temperature",
        1.0,
        ("of 0 or more", lambda x: 0 <= x < 1e38),
        "divide logits by this; 0: greedy",
    )
    number("--top-p", 1.0, share, top_p)
    add(
        "--top-k",
        type=integer(0),
        default=0,
        metavar="N",
        help="sample from the N most probable tokens; 0: from all (default: 0)",
    )
    likely = "sample from tokens at least this fraction as probable as the most probable"
    number("--min-p", 0.0, ("from 0 to 1", lambda x: 0 <= x <= 1), likely)
    repeated = "penalty for tokens in the prompt or output, as in transformers; 1: off"
    number("--repetition-penalty", 1.0, ("above 0", lambda x: 1e-30 < x < 1e38), repeated)
    number("--presence-penalty", 0.0, penalty, "subtract this from the logits of generated tokens")
    number("--frequency-penalty", 0.0, penalty, "subtract this for each time a token was generated")
    add(
        "--seed",
        type=integer(0),
        metavar="N",
        help="seed of the draws; the same seed generates the same text (default: random)",
    )


def add_running_options(group: Any) -> None:
    """Add the options for loading and running the model."""
    add = group.add_argument
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="dtype of weights, activations and cache (default: bfloat16)",
    )
    add(
        "--numerics",
        choices=("official", "hf"),
        default="official",
        help="round where DeepSeek's runtime does (default) or where transformers does",
    )
    mesh = "shard the model over all devices: auto, tensor=4 or expert=4,tensor=2; axes: data, "
    add("--mesh", metavar="SIZES", help=mesh + "fsdp, expert, tensor (default: the first device)")
    adapter = "apply the update of this PEFT adapter (a directory or Hub id) or training run"
    add("--adapter", metavar="DIR", help=adapter)
    state = "with a training run: use its state after this step instead of its newest"
    add("--state", type=integer(1), metavar="STEP", help=state)
    add(
        *("--keep-quantised", "--keep"),
        action="store_true",
        help="keep FP8 and FP4 weights quantised, to save memory",
    )


def add_speculate(group: Any) -> None:
    """Add the option that drafts."""
    text = "draft N tokens at a time with the MTP block; the answer stays the same"
    group.add_argument("--speculate", metavar="mtp:N", help=text)


def add_revision(parser: Any) -> None:
    """Add the revision of a Hub id."""
    text = "branch, tag or commit of a Hub id (default: the main branch)"
    parser.add_argument("--revision", metavar="NAME", help=text)


class _TurnCacheOff(argparse.Action):
    """Turns the cache of compiled programs off for this process; see `v4jax.programs`."""

    def __call__(self, *_: Any) -> None:
        os.environ["V4JAX_CACHE"] = "off"


def add_no_cache(parser: Any) -> None:
    """Add the option that turns the cache of compiled programs off."""
    text = "do not use or write the cache of compiled programs in the user's cache directory"
    parser.add_argument("--no-cache", nargs=0, action=_TurnCacheOff, help=text)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that several processes can share."""
    group = parser.add_argument_group("several processes, on hosts that see the same directories")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="run as one of the processes that JobSet, Ray, Slurm, Kubeflow or a TPU pod started",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=integer(1), metavar="N", help="number of processes")
    group.add_argument("--process", type=integer(0), metavar="I", help="index of this one, from 0")
    group.add_argument(
        "--wait",
        type=integer(1),
        default=300,
        metavar="SECONDS",
        help="how long to wait for the other processes (default: 300)",
    )


def join_processes(
    args: argparse.Namespace, join: "Callable[[Place | None, float], Any] | None" = None
) -> None:
    """Join the other processes that the options name, if any.

    Args:
      args: the options.
      join: takes the process's place and the seconds to wait; by default `cluster.join`.
    """
    from v4jax import cluster

    given = (args.coordinator, args.processes, args.process)
    is_given = given != (None, None, None)
    if is_given and None in given:
        raise ValueError("--coordinator, --processes and --process go together.")
    if not is_given and not args.distributed:
        return
    place = cluster.at(*given, os.environ) if is_given else cluster.locate(os.environ)
    (join or cluster.join)(place, args.wait)


def run_state(run: str | Path, step: int | None) -> str | Path:
    """The path of a training run or, with a step, of its state after that step."""
    if step is None:
        return run
    from v4jax.adapters.runs import STATES

    return Path(run) / STATES / str(step)


def check_state(args: argparse.Namespace) -> None:
    """Reject --state without the run that it is of.

    Raises:
      ValueError: there is no --adapter.
    """
    if args.state is not None and args.adapter is None:
        raise ValueError("--state needs a training run; pass it with --adapter.")


def directory(args: argparse.Namespace) -> Path:
    """The directory of the checkpoint that a command runs, which must have a tokenizer.

    Loading takes minutes, so errors are looked for before it.

    Raises:
      ValueError: the tokenizer is missing.
    """
    from v4jax.checkpoints import hub

    path = hub.resolve(args.path, revision=args.revision)
    if (path / "config.json").is_file() and not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: has no tokenizer.json; copy it there from the release.")
    return path


def load(args: argparse.Namespace, path: Path) -> "LanguageModel":
    """Load a checkpoint as the options for running say."""
    import v4jax

    return v4jax.load(
        path,
        dtype=args.dtype,
        numerics=args.numerics,
        keep_quantised=args.keep_quantised,
        adapter=args.adapter and run_state(args.adapter, args.state),
        mesh=mesh_of(args, path),
    )


def mesh_of(
    args: argparse.Namespace,
    path: str | Path,
    *,
    rows: int = 1,
    context: int | None = None,
    cache_dtype: str | None = None,
) -> "Mesh | None":
    """The mesh that --mesh names; of 'auto' the one that `v4jax plan` favours, which is printed.

    Args:
      args: the options, with `mesh` and `keep_quantised`.
      path: the checkpoint, of which only the configuration is read.
      rows: sequences that run at once.
      context: tokens of a sequence; by default a part of the model's own.
      cache_dtype: the engine's.
    """
    from v4jax.model import sharding

    if args.mesh != "auto":
        return None if args.mesh is None else sharding.read_mesh(args.mesh)
    import jax

    from v4jax.commands import command_line, inspect
    from v4jax.pods import chips, mesh_search
    from v4jax.pods.serving import Serving

    devices = jax.devices()
    cfg = inspect.find(path, revision=args.revision).config
    job = Serving(
        cfg=cfg,
        name="decode",
        context=context or min(_CONTEXT, cfg.max_position_embeddings),
        # The engine rounds rows up to a multiple of the groups that share them.
        batch=rows if rows == 1 else -(-rows // len(devices)) * len(devices),
        cache_dtype=cache_dtype,
        keep_quantised=args.keep_quantised,
    )
    sizes = mesh_search.choose(job, chips.of_devices(devices))
    command_line.say(f"mesh {mesh_search.named(sizes)} for {len(devices)} devices")
    return sharding.make_mesh(**sizes)


def encoding(thinking: str, cfg: "ModelConfig") -> dict[str, Any]:
    """Arguments of `encode_chat` for a value of --thinking.

    Raises:
      ValueError: the checkpoint does not support the effort.
    """
    from v4jax.text.chat import EFFORTS

    revision = cfg.chat_revision
    if thinking == "off":
        return {"revision": revision}
    efforts = [effort for effort in EFFORTS[revision] if effort]
    if thinking not in efforts:
        raise ValueError(
            f"--thinking {thinking}: not supported by this checkpoint (revision {revision}); "
            f"use one of {', '.join(efforts)}."
        )
    return {"thinking_mode": "thinking", "reasoning_effort": thinking, "revision": revision}


def integer(least: int) -> Callable[[str], int]:
    """A parser of integers of `least` or more."""

    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"'{text}' is not an integer of {least} or more")
        return value

    return parse


def _number(expected: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not a number {expected}")
        return value

    return parse
