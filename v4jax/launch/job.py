"""What is launched: a recipe, where it runs, and under which name."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4jax.launch.topology import CPU, Topology

# The coordinator's port on Cloud TPUs.
PORT = 8482
# Seconds between the signal to end and the end: enough to save a state.
GRACE = 600
# Exit statuses of v4jax-train: wrong options, and a state saved because of SIGTERM.
MISUSE, SAVED = 2, 143
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST = 63  # characters of a label in DNS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training run for a launcher.

    Attributes:
      recipe: the recipe's file.
      text: its text.
      flags: options of `v4jax-train` besides the recipe.
      local: directory on each host for frequent states, the recipe's `checkpoints.local`.
      topology: the slice, or the nodes.
      slices: number of slices.
      name: the job's name.
      restarts: how often the launcher starts the run again after a failure.
      image: container image, or empty.
      namespace: namespace in Kubernetes, or empty.
      queue: Kueue's local queue, or empty.
      volumes: paths in the container by PersistentVolumeClaim.
      hosts: hosts to log in to.
    """

    recipe: Path
    text: str
    flags: tuple[str, ...]
    local: str
    topology: Topology
    slices: int
    name: str
    restarts: int
    image: str = ""
    namespace: str = ""
    queue: str = ""
    volumes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject names that DNS does not allow; pods have the longest."""
        suffix = f"-slice-{self.slices - 1}-{self.topology.hosts - 1}-abcde"
        longest = _LONGEST - len(suffix)
        if not _LABEL.fullmatch(self.name) or len(self.name) > longest:
            raise ValueError(
                f"--name {self.name!r}: use at most {longest} lower-case letters, digits and"
                " hyphens, beginning with a letter and not ending with a hyphen."
            )

    @property
    def processes(self) -> int:
        """Number of hosts, each with one process."""
        return self.slices * self.topology.hosts

    @property
    def description(self) -> str:
        """What runs where."""
        count = f"{self.slices} x " if self.slices > 1 else ""
        return f"The training run {self.name} on {count}{self.topology}."

    @property
    def environment(self) -> dict[str, str]:
        """Variables that CPUs need; TPUs and GPUs need none."""
        if self.topology.kind != CPU:
            return {}
        several = f"--xla_force_host_platform_device_count={self.topology.chips_per_host}"
        flags = {"XLA_FLAGS": several} if self.topology.chips_per_host > 1 else {}
        return {"JAX_PLATFORMS": "cpu"} | flags

    @property
    def options(self) -> list[str]:
        """Options of `v4jax-train`; a run that has begun continues."""
        return [*self.flags, "--resume"]

    def command(self, recipe: str | Path, *more: str) -> list[str]:
        """The words that each process runs."""
        return ["v4jax-train", str(recipe), *self.options, *more]


def name_of(recipe: Path) -> str:
    """A job's name from the name of a recipe's file."""
    name = re.sub(r"[^a-z0-9]+", "-", recipe.stem.lower()).strip("-")
    if not _LABEL.fullmatch(name):
        raise ValueError(f"{recipe}: its name gives no name for the job; give --name.")
    return name


def paths(
    recipe: Path, tables: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """What a run reads and writes: its 'data', 'out' and 'checkpoints.local'.

    Args:
      recipe: the recipe's file.
      tables: the recipe.
      given: what the command says instead: 'model', 'data' and 'out'.

    Raises:
      ValueError: the model, the data or the run's directory is not named, or is no path.
    """
    named = {
        "model": _table(recipe, tables, "model").get("path"),
        "data": _table(recipe, tables, "data").get("files"),
        "out": tables.get("out"),
    }
    for key, value in given.items():
        named[key] = value or named[key]
    if missing := [f"--{key}" for key, value in named.items() if not value]:
        raise ValueError(
            f"{recipe}: does not name all that a run needs; give {', '.join(missing)}."
        )
    named["checkpoints.local"] = _table(recipe, tables, "checkpoints").get("local", "")
    several = {k: v if isinstance(v, list) else [v] for k, v in named.items() if k != "model"}
    for key, values in several.items():
        if wrong := [value for value in values if not isinstance(value, str)]:
            raise ValueError(f"{recipe}: {key} is {wrong[0]!r:.100}; it must be a path.")
    return {key: tuple(value for value in values if value) for key, values in several.items()}


def check_mesh(recipe: Path, tables: Mapping[str, Any], topology: Topology) -> None:
    """Reject a mesh that does not divide the devices of a slice.

    Raises:
      ValueError: it does not; the message says what would.
    """
    mesh = tables.get("mesh", {})
    if not isinstance(mesh, dict):
        return
    sizes = {axis: size for axis, size in mesh.items() if isinstance(size, int)}
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"{recipe}: mesh.{axis} is {size}; use 1 or more.")
    product = math.prod(sizes.values())
    if topology.devices % product:
        axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(
            f"{recipe}: [mesh] needs a multiple of {product} devices ({axes}); {topology} has"
            f" {topology.devices}. Use sizes whose product divides {topology.devices}, or another"
            " --topology."
        )


def _table(recipe: Path, tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"{recipe}: {name} is {table!r:.100}; it must be a table.")
    return table
