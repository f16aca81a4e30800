"""`v4jax plan`: what a job takes on a slice, from the slice's own compiler."""

import argparse
import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4jax.commands import options

if TYPE_CHECKING:
    from v4jax.model.config import ModelConfig
    from v4jax.pods.chips import Slice
    from v4jax.pods.jobs import Job
    from v4jax.pods.mesh_search import Candidate
    from v4jax.pods.plan import Plan
    from v4jax.waiting import Progress

SERVING = ("decode", "prefill")
TRAINING = ("train-lora", "train-muon", "train-adamw")
# Applications register functions (job, config, options) -> Job here, under their jobs' names.
GROUP = "v4jax.jobs"
_CONTEXT, _SEQ = 65536, 4096
# Meshes that are compiled until one fits.
_TRIES = 3
# libtpu would look for a TPU's metadata on the network, and say that it found none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
EPILOG = """\
PATH is a preset, a config.json, a checkpoint's directory or a Hub id; no weights are read. The
program is compiled for the slice by its own compiler, which no TPU is needed for, and all figures
are of one device and one step. Without --mesh, the mesh that arithmetic favours is compiled. With
--search, the smallest slice that fits is looked for. Results are kept in the user's cache
directory. docs/plan.md explains every line.

exit status: 0 it fits, 1 it does not, 2 misuse.

examples:
  v4jax plan flash --topology v6e:2x4 --job decode --context 1048576 --batch 8
  v4jax plan pro --topology tpu7x:4x4x8 --job train-lora --seq 8192 --global-batch 256
  v4jax plan flash --job train-muon --seq 4096 --search v5p,v6e,tpu7x
  v4jax plan tiny --topology here --job decode
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add, whole = parser.add_argument, options.integer(1)
    where = parser.add_mutually_exclusive_group(required=True)
    text = "chip and shape, such as v6e:2x4, tpu7x:4x4x8 or h200:8; 'here': this machine's devices"
    where.add_argument("--topology", metavar="SLICE", help=text)
    text = "find the smallest slice of these chips that fits, such as v5p,v6e,tpu7x"
    where.add_argument("--search", metavar="CHIPS", help=text)
    text = "the program to plan (default: decode)"
    add("--job", choices=(*SERVING, *TRAINING), default="decode", help=text)
    text = "tokens of a sequence, all in the cache (default: 65536, or the model's own)"
    add("--context", type=whole, metavar="N", help=f"decode, prefill: {text}")
    text = "decode, prefill: sequences at once (default: 8)"
    add("--batch", type=whole, metavar="N", help=text)
    text = "decode, prefill: the cache's entries (default: fp8)"
    add("--cache-dtype", choices=("fp8", "bfloat16"), help=text)
    add("--seq", type=whole, metavar="N", help="training: tokens of a row (default: 4096)")
    text = "training: rows of a step (default: one per device)"
    add("--global-batch", type=whole, metavar="N", help=text)
    text = "training: parts of a step, run one after another (default: 1)"
    add("--parts", type=whole, metavar="N", help=text)
    text = "sizes of the mesh's axes, such as expert=8,tensor=2 (default: auto)"
    add("--mesh", metavar="SIZES", default="auto", help=text)
    add("--json", action="store_true", help="print the plan as JSON")
    text = "draw memory and time to this file; needs matplotlib"
    add("--plot", type=Path, metavar="FILE", help=text)
    options.add_revision(parser)
    options.add_no_cache(parser)


def run(args: argparse.Namespace) -> int:
    """Make a plan and print it.

    Returns:
      0 if the job fits, 1 if it does not.
    """
    _check(args)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from v4jax import waiting
    from v4jax.commands import inspect
    from v4jax.pods import picture, report

    cfg = inspect.find(args.path, revision=args.revision).config
    target: Path | None = args.plot
    figure = None if target is None else picture.empty(target)
    with waiting.progress() as progress:
        plan, others = _search(args, cfg, progress) if args.search else _plan(args, cfg, progress)
    if target is not None:
        picture.draw(plan, figure, target)
    show = report.show_json if args.json else report.show
    show(plan, others)
    return 0 if plan.fits else 1


def _check(args: argparse.Namespace) -> None:
    """Reject options that the job does not have.

    Raises:
      ValueError: there is one.
    """
    trains = args.job in TRAINING
    foreign = ("context", "batch", "cache_dtype") if trains else ("seq", "global_batch", "parts")
    for name in foreign:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is not an option of {args.job}; leave it out.")
    if args.search and args.mesh != "auto":
        raise ValueError("--search looks for the mesh too; leave --mesh out.")


def _plan(
    args: argparse.Namespace, cfg: "ModelConfig", progress: "Progress"
) -> tuple["Plan", list["Candidate"]]:
    """The plan for a slice, and the other meshes."""
    from v4jax.pods import chips, mesh_search

    if args.topology == chips.HERE:
        import jax

        devices: list[Any] = jax.devices()
        where = chips.of_devices(devices)
    else:
        where, devices = chips.parse(args.topology), []
    job = job_of(args, cfg, where.devices)
    if args.mesh != "auto":
        sizes = mesh_search.read(args.mesh, where.devices)
        return _compiled(args, job, where, devices, [sizes], progress), []
    progress(f"Comparing meshes of {where.devices} devices", 0, 0)
    candidates = mesh_search.ranked(job, where)
    tried = [candidate.sizes for candidate in candidates[:_TRIES] if candidate.fits(where)]
    plan = _compiled(args, job, where, devices, tried or [candidates[0].sizes], progress)
    return plan, candidates


def _search(
    args: argparse.Namespace, cfg: "ModelConfig", progress: "Progress"
) -> tuple["Plan", list["Candidate"]]:
    """The plan for the smallest slice that fits, or for the largest if none does."""
    from v4jax.pods import chips, mesh_search

    plan, candidates, reason = None, [], ""
    for where in chips.slices([name.strip() for name in args.search.split(",")]):
        progress(f"Comparing meshes of {where.name}", 0, 0)
        job = job_of(args, cfg, where.devices)
        if not mesh_search.has_room(job, where):
            continue
        try:
            candidates = mesh_search.ranked(job, where)
        except ValueError as error:
            reason = str(error)
            continue
        tried = [candidate.sizes for candidate in candidates[:_TRIES] if candidate.fits(where)]
        if tried:
            plan = _compiled(args, job, where, [], tried, progress)
            if plan.fits:
                return plan, candidates
    if plan is None:
        raise ValueError(
            f"No slice of {args.search} has room for {args.job}. {reason or 'Use a smaller batch.'}"
        )
    return plan, candidates


def _compiled(
    args: argparse.Namespace,
    job: "Job",
    where: "Slice",
    devices: list[Any],
    meshes: list[dict[str, int]],
    progress: "Progress",
) -> "Plan":
    """The plan for the first mesh that fits, or for the first one if none does."""
    import jax

    from v4jax.pods import plan as plans

    devices = devices or devices_of(where)
    first = None
    for sizes in meshes:
        # Choices of kernels are recorded when a function is traced, not when that is remembered.
        jax.clear_caches()
        plan = plans.make(args.path, job, where, devices, sizes, progress=progress)
        if plan.fits:
            return plan
        first = first or plan
    assert first is not None
    return first


def devices_of(where: "Slice") -> list[Any]:
    """The devices of a slice, which are not attached.

    Raises:
      ValueError: the compiler is not installed, or does not know the slice.
    """
    from jax.experimental import topologies

    from pallas_kernels import targets

    is_tpu = where.chip is not None and where.chip.is_tpu
    try:
        if not is_tpu:
            return list(targets.devices("h200")[: where.devices])
        topology = topologies.get_topology_desc(platform="tpu", topology_name=where.name)
        return list(topology.devices)
    except (RuntimeError, ValueError) as error:
        if "topology" in str(error).lower() or "divisible" in str(error):
            raise ValueError(f"{where.name}: the compiler has no such slice ({error})") from error
        extra = "tpu" if is_tpu else "gpu"
        raise ValueError(
            f"no compiler for {where.name} is installed ({error}); run pip install "
            f"'v4jax[{extra}]'."
        ) from error


def job_of(args: argparse.Namespace, cfg: "ModelConfig", devices: int) -> "Job":
    """The job that the options describe.

    Raises:
      ValueError: the application of the job is not installed.
    """
    if args.job in TRAINING:
        return _application(args.job)(
            args.job,
            cfg,
            seq_len=args.seq or _SEQ,
            batch=args.global_batch or devices * (args.parts or 1),
            parts=args.parts or 1,
        )
    from v4jax.pods.serving import Serving

    longest = cfg.max_position_embeddings
    if args.context is not None and args.context > longest:
        raise ValueError(f"--context is {args.context}; the model's own is {longest}.")
    cache_dtype = args.cache_dtype or ("fp8" if cfg.quantized else "bfloat16")
    return Serving(
        cfg=cfg,
        name=args.job,
        context=args.context or min(_CONTEXT, longest),
        batch=args.batch or 8,
        cache_dtype=None if cache_dtype == "bfloat16" else cache_dtype,
    )


def _application(name: str) -> Any:
    """What an installed application registered for a job."""
    for entry in importlib.metadata.entry_points(group=GROUP, name=name):
        try:
            return entry.load()
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--job {name}: {error.name} is missing; pip install 'v4jax[train]'"
            ) from error
    raise ValueError(f"--job {name}: no installed application has it; pip install 'v4jax[train]'")
