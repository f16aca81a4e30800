"""`v4jax launch`: a recipe as a job of a launcher."""

import argparse
import dataclasses
import importlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from v4jax.commands import options
from v4jax.launch import job, topology
from v4jax.text import files

EPILOG = """\
With --dry-run the file for the launcher is printed; without it, the launcher's own command gets the
file. The recipe's mesh is checked against the topology; 'v4jax-train preview' checks the rest.

examples:
  v4jax launch train.toml --on gke --topology v5p:4x4x8 --image IMAGE --volume runs:/runs \\
      --model /runs/flash --data /runs/chats.jsonl --out /runs/a --dry-run
  v4jax launch train.toml --on slurm --topology h200:2x8 --dry-run
"""


@dataclasses.dataclass(frozen=True)
class Launcher:
    """A launcher.

    Attributes:
      module: the module of `v4jax.launch` whose `text` writes its file.
      file: name of that file.
      command: the launcher's own command; {path} is the file, {directory} its directory.
      takes: options that only some launchers take.
      needs: those of them that it cannot do without.
      runs_on: what it runs on.
      shares: whether the processes have the directory in common in which they are launched.
    """

    module: str
    file: str
    command: tuple[str, ...]
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    runs_on: tuple[str, ...] = (*topology.TPUS, *topology.GPUS, topology.CPU)
    shares: bool = False


LAUNCHERS = {
    "gke": Launcher(
        *("jobset", "jobset.yaml", ("kubectl", "apply", "-f", "{path}")),
        takes=("image", "namespace", "queue", "volume", "slices"),
        needs=("image",),
        runs_on=tuple(topology.TPUS),
    ),
    "ray": Launcher(
        *("ray_script", "train_on_ray.py"),
        ("ray", "job", "submit", "--working-dir", "{directory}", "--", "python", "train_on_ray.py"),
        takes=("slices",),
    ),
    "slurm": Launcher("slurm", "train.sbatch", ("sbatch", "{path}"), shares=True),
    "ssh": Launcher(
        *("ssh", "train.sh", ("bash", "{path}")),
        takes=("hosts", "slices"),
        needs=("hosts",),
        shares=True,
    ),
    "skypilot": Launcher(
        *("skypilot", "task.yaml", ("sky", "jobs", "launch", "{path}")),
        takes=("image",),
        runs_on=("v5p", "v6e", *topology.GPUS),
    ),
}
_SPECIAL = ("slices", "image", "namespace", "queue", "volume", "hosts")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("recipe", type=Path, metavar="RECIPE", help="a TOML file, as v4jax-train takes it")
    add("--on", choices=LAUNCHERS, required=True, help="the launcher")
    add(
        "--topology",
        required=True,
        metavar="NAME",
        help="a TPU slice (v5p:4x4x8, v6e:4x4, tpu7x:2x2x4), nodes with GPUs (h200:2x8: 2 nodes"
        " of 8) or, to try things out, CPUs (cpu:2x1)",
    )
    add("--model", metavar="PATH", help="as in v4jax-train; default: the recipe's model.path")
    add(
        "--data",
        action="append",
        metavar="FILE",
        help="as in v4jax-train, may be repeated; default: the recipe's data.files",
    )
    add(
        "--out",
        metavar="DIR",
        help="directory of the run, which all processes share; default: the recipe's out",
    )
    add("--name", metavar="NAME", help="name of the job (default: the name of the recipe's file)")
    add(
        "--restarts",
        type=options.integer(0),
        default=10,
        metavar="N",
        help="how often to start the run again after a failure (default: 10)",
    )
    special = parser.add_argument_group("options of some launchers")
    add = special.add_argument
    add(
        "--slices",
        type=options.integer(1),
        metavar="N",
        help="gke, ray, ssh: number of TPU slices (default: 1)",
    )
    add("--image", help="gke, skypilot: container image in which v4jax is installed")
    add("--namespace", metavar="NAME", help="gke: namespace in Kubernetes")
    add("--queue", metavar="NAME", help="gke: a LocalQueue of Kueue")
    add(
        "--volume",
        action="append",
        metavar="CLAIM:PATH",
        help="gke: mount this PersistentVolumeClaim at this path; may be repeated",
    )
    add("--hosts", metavar="A,B,...", help="ssh: the hosts, slice by slice, process 0 first")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the file for the launcher, and do nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Print the file for the launcher, or give it to the launcher's own command."""
    launcher = LAUNCHERS[args.on]
    text = importlib.import_module(f"v4jax.launch.{launcher.module}").text(_job(args, launcher))
    if args.dry_run:
        print(text, end="")
        return 0
    return _submit(launcher, text)


def _submit(launcher: Launcher, text: str) -> int:
    program = launcher.command[0]
    if shutil.which(program) is None:
        by_hand = " ".join(launcher.command).format(path=launcher.file, directory=".")
        raise ValueError(
            f"{program} is not installed; add --dry-run > {launcher.file}, and where it is, run"
            f" '{by_hand}'."
        )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, launcher.file)
        path.write_text(text, encoding="utf-8")
        words = [word.format(path=path, directory=directory) for word in launcher.command]
        status = subprocess.run(words, check=False).returncode
    if status:
        raise ValueError(f"{program} failed with status {status}.")
    return 0


def _job(args: argparse.Namespace, launcher: Launcher) -> job.Job:
    _check_options(args, launcher)
    where = topology.read(args.topology)
    if where.kind not in launcher.runs_on:
        others = [name for name, other in LAUNCHERS.items() if where.kind in other.runs_on]
        raise ValueError(
            f"--on {args.on}: does not launch on {where.kind}; {' and '.join(others)} do."
        )
    tables = files.read_toml(args.recipe)
    job.check_mesh(args.recipe, tables, where)
    given = {"model": args.model, "data": args.data, "out": args.out}
    paths = job.paths(args.recipe, tables, given)
    absolute = lambda path: re.match(r"/|\w+://", path)
    relative = [(what, path) for what in paths for path in paths[what] if not absolute(path)]
    if relative and not launcher.shares:
        what, path = relative[0]
        raise ValueError(
            f"{what} is {path}, relative to a directory of each process; use a path that begins"
            " with /."
        )
    local = "".join(paths["checkpoints.local"])
    flags = [
        ("--model", args.model),
        *(("--data", x) for x in args.data or ()),
        ("--out", args.out),
    ]
    return job.Job(
        recipe=args.recipe,
        text=files.read_text(args.recipe),
        flags=tuple(word for pair in flags if pair[1] for word in pair),
        local=local,
        topology=where,
        slices=_slices(args, where),
        name=job.name_of(args.recipe) if args.name is None else args.name,
        restarts=args.restarts,
        image=args.image or "",
        namespace=args.namespace or "",
        queue=args.queue or "",
        volumes=_volumes(args.volume or (), local),
        hosts=_hosts(args, where),
    )


def _check_options(args: argparse.Namespace, launcher: Launcher) -> None:
    for name in _SPECIAL:
        value = getattr(args, name)
        if value is not None and name not in launcher.takes:
            takers = [key for key, other in LAUNCHERS.items() if name in other.takes]
            raise ValueError(
                f"--{name} is an option of --on {' and '.join(takers)}, not {args.on}."
            )
        if not value and name in launcher.needs:
            raise ValueError(f"--on {args.on} needs --{name}.")
        if isinstance(value, str) and re.search(r"\s", value):
            raise ValueError(f"--{name} {value!r}: remove the spaces.")
    for name in ("namespace", "queue"):
        if getattr(args, name) is not None:
            _check_object(f"--{name}", getattr(args, name))


def _slices(args: argparse.Namespace, where: topology.Topology) -> int:
    slices = args.slices or 1
    if slices > 1 and not where.is_tpu:
        raise ValueError(f"--slices {slices}: {where} has nodes, not slices; give more nodes.")
    if slices > 1 and args.on == "gke" and where.hosts == 1:
        raise ValueError(
            f"--slices {slices}: GKE connects only slices of several hosts, and {where} has one."
        )
    return slices


def _hosts(args: argparse.Namespace, where: topology.Topology) -> tuple[str, ...]:
    if args.hosts is None:
        return ()
    hosts, wanted = tuple(args.hosts.split(",")), where.hosts * _slices(args, where)
    if wrong := [host for host in hosts if not re.fullmatch(r"[\w.:@\[\]][\w.:@\[\]-]*", host)]:
        raise ValueError(f"--hosts: {wrong[0]!r} is not a host; give names with commas between.")
    if len(hosts) != wanted or len(set(hosts)) != wanted:
        raise ValueError(
            f"--hosts names {len(set(hosts))} hosts; {where} with --slices"
            f" {args.slices or 1} has {wanted}."
        )
    return hosts


def _volumes(given: Sequence[str], local: str) -> dict[str, str]:
    volumes: dict[str, str] = {}
    for text in given:
        claim, _, path = text.partition(":")
        _check_object(f"--volume {text}: the claim", claim)
        if not re.fullmatch(r"/[^:\s]+", path):
            raise ValueError(f"--volume {text}: give CLAIM:PATH, where PATH begins with /.")
        if claim in volumes or path in (*volumes.values(), local):
            raise ValueError(f"--volume {text}: the claim or the path is already mounted.")
        volumes[claim] = path
    return volumes


def _check_object(what: str, name: str) -> None:
    """Reject what is no name of an object in Kubernetes."""
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", name):
        raise ValueError(
            f"{what} {name!r}: use at most 63 lower-case letters, digits, hyphens and dots,"
            " beginning and ending with a letter or digit."
        )
