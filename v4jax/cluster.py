"""Clusters: the place of a process among all of a run, and joining the others.

The launcher's environment variables give the place. In the order of the function `locate`:

- JobSet: JOB_COMPLETION_INDEX is the index within a slice and JOBSET_JOB_INDEX the slice's; there
  are JOBSET_PODS processes in each of JOBSET_REPLICAS slices; process 0 is on JOBSET_COORDINATOR.
  The manifest sets these from JobSet's annotations and the job's `parallelism`, as in
  docs/finetune.md; without them GKE's variables for TPUs, or Kubeflow's, serve.
- Slurm: SLURM_PROCID of SLURM_STEP_NUM_TASKS, with process 0 on the first of SLURM_STEP_NODELIST.
- Ray's trainers and torchrun: RANK of WORLD_SIZE, with process 0 at MASTER_ADDR and MASTER_PORT.
- Kubeflow: JAX_PROCESS_ID of JAX_NUM_PROCESSES, with process 0 at JAX_COORDINATOR_ADDRESS.
- Cloud TPU: TPU_WORKER_ID of TPU_WORKER_HOSTNAMES, in slice MEGASCALE_SLICE_ID.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from v4jax import rendezvous
from v4jax.rendezvous import ClusterError, Peers

PORT = 8482  # where JAX's coordinator listens on Cloud TPUs
_MEGASCALE_PORT = 8081
_MEGASCALE = (
    "MEGASCALE_COORDINATOR_ADDRESS",
    "MEGASCALE_PORT",
    "MEGASCALE_NUM_SLICES",
    "MEGASCALE_SLICE_ID",
)
_SLURM_PORTS = 61440, 4096  # the first, and how many: jobs that share a host differ
_REMEDY = "Correct the variables, or give --coordinator, --processes and --process."
_KUBEFLOW = (
    "JAX_PROCESS_ID",
    "JAX_NUM_PROCESSES",
    "JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_PORT",
)
Environment = Mapping[str, str]
_REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a process among all of a run.

    Attributes:
      launcher: what says so.
      process: index of the process, from 0; unique across slices.
      processes: number of processes.
      coordinator: HOST:PORT of process 0.
      slice: index of the process's slice.
      slices: number of slices, which have equally many processes.
      hosts: the host of each process; empty if the launcher does not name them.
    """

    launcher: str
    process: int
    processes: int
    coordinator: str
    slice: int = 0
    slices: int = 1
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject indices out of range, and slices that processes cannot fill."""
        for what, index, count in (
            ("process", self.process, self.processes),
            ("slice", self.slice, self.slices),
        ):
            if not 0 <= index < count:
                self._contradicts(f"{what} {index} of {count}")
        if self.processes % self.slices or self.process // self.hosts_per_slice != self.slice:
            self._contradicts(
                f"process {self.process} of {self.processes} in slice {self.slice} of {self.slices}"
            )
        if not re.fullmatch(r".+:\d+", self.coordinator):
            raise ClusterError(f"The coordinator is {self.coordinator!r}; give HOST:PORT.")

    def _contradicts(self, what: str) -> None:
        raise ClusterError(f"{self.launcher} says that this is {what}. {_REMEDY}")

    @property
    def hosts_per_slice(self) -> int:
        """Number of processes in each slice."""
        return self.processes // self.slices

    def megascale(self) -> dict[str, str]:
        """The variables by which libtpu connects slices; none for a single slice."""
        if self.slices == 1:
            return {}
        host = self.coordinator.rpartition(":")[0]
        values = (host, str(_MEGASCALE_PORT), str(self.slices), str(self.slice))
        return dict(zip(_MEGASCALE, values, strict=True))


def locate(environment: Environment) -> Place | None:
    """The place that the launcher's variables give a process.

    What MEGASCALE_* say is used only if nothing else says it: after a preemption they can be those
    of the previous set of slices.

    Returns:
      None if there are no such variables. JAX may still detect a Cloud TPU by its metadata server.

    Raises:
      ClusterError: variables are missing, or contradict each other.
    """
    places = [read(environment) for key, read in _LAUNCHERS.items() if key in environment]
    if "JOB_COMPLETION_INDEX" in environment:
        # Kubeflow's index restarts in each slice too.
        places = [place for place in places if place.launcher != "Kubeflow"]
    if not places and "TPU_WORKER_ID" in environment and _tpu_hosts(environment):
        places = [_cloud_tpu(environment)]
    for place in places[1:]:
        if (place.process, place.processes) != (places[0].process, places[0].processes):
            said = (f"{x.launcher}: process {x.process} of {x.processes}" for x in places)
            raise ClusterError(f"Launchers contradict each other ({'; '.join(said)}). {_REMEDY}")
    return places[0] if places else None


def at(coordinator: str, processes: int, process: int, environment: Environment) -> Place:
    """The place that the user gives; only what its slice is comes from the environment."""
    return _in_slice("The command", process, processes, coordinator, environment)


def join(place: Place | None, timeout: float = 300.0) -> Peers | None:
    """Join the other processes of a run; call it before JAX is used.

    Sets MEGASCALE_* anew from the place. Does nothing if `jax.distributed` is initialised, as it is
    inside Ray's JaxTrainer.

    Args:
      place: the process's place; None: JAX's own detection finds it.
      timeout: seconds to wait for the others.

    Returns:
      The other processes, to be watched; None if they are not known.

    Raises:
      ClusterError: processes are missing, which it names, or have the same index.
    """
    import jax

    if jax.distributed.is_initialized():
        return None
    if place is None:
        _detect(timeout)
        return None
    for name in _MEGASCALE:
        os.environ.pop(name, None)
    os.environ.update(place.megascale())
    peers = rendezvous.meet(
        place.coordinator, place.process, place.processes, timeout=timeout, hosts=place.hosts
    )
    # JAX would ask Kubernetes; elsewhere it detects which GPU belongs to the process.
    method = "deactivate" if place.launcher == "JobSet" else None
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        cluster_detection_method=method,
        initialization_timeout=round(timeout),
    )
    return peers


def _detect(timeout: float) -> None:
    import jax

    try:
        jax.distributed.initialize(initialization_timeout=round(timeout))
    except ValueError as error:
        raise ClusterError(
            f"No launcher is detected ({error}); give --coordinator, --processes and --process."
        ) from None


def _jobset(environment: Environment) -> Place:
    number = _reader("JobSet", environment)
    hosts, total = _tpu_hosts(environment), number("JAX_NUM_PROCESSES", None)
    slices = number("JOBSET_REPLICAS", None)
    pods = number("JOBSET_PODS", len(hosts) or None)
    if slices is None:
        known = total // pods if total and pods else None
        slices = known or number("MEGASCALE_NUM_SLICES", 1)
    pods = pods or (total // slices if total and slices else None)
    if not pods:
        raise ClusterError("JobSet: set JOBSET_PODS to the parallelism of the job.")
    pod = number("JOB_COMPLETION_INDEX")
    index = number("JOBSET_JOB_INDEX", None)
    if index is None:
        index = 0 if slices == 1 else number("MEGASCALE_SLICE_ID")
    if pod >= pods or total not in (None, pods * slices) or len(hosts) not in (0, pods):
        raise ClusterError(
            f"JobSet says that this is pod {pod} of {pods} in one of {slices} slices; in all there"
            f" are {total or pods * slices} processes, and {len(hosts) or pods} hosts in a slice."
            f" {_REMEDY}"
        )
    _check_worker("JobSet", pod, environment)
    coordinator = (
        environment.get("JOBSET_COORDINATOR")
        or environment.get("JAX_COORDINATOR_ADDRESS")
        or (hosts[0] if slices == 1 and hosts else _megascale_host(environment))
    )
    if not coordinator:
        raise ClusterError("JobSet: set JOBSET_COORDINATOR to the host of process 0.")
    return Place(
        "JobSet",
        index * pods + pod,
        pods * slices,
        _with_port(coordinator, environment, PORT),
        index,
        slices,
        hosts if slices == 1 else (),
    )


def _slurm(environment: Environment) -> Place:
    number = _reader("Slurm", environment)
    nodes = environment.get("SLURM_STEP_NODELIST")
    if nodes is None:
        raise ClusterError("This is a Slurm job, but not a step of it; start it with srun.")
    # The first of 'node[001-015,020],other', 'node001,other' and the like.
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ClusterError(f"SLURM_STEP_NODELIST is {nodes!r}; it must name nodes. {_REMEDY}")
    first = "".join(part or "" for part in match.groups())
    base, count = _SLURM_PORTS
    port = base + number("SLURM_JOB_ID", 0) % count
    processes = number("SLURM_STEP_NUM_TASKS", None)
    return _in_slice(
        "Slurm",
        number("SLURM_PROCID"),
        number("SLURM_NTASKS") if processes is None else processes,
        _with_port(first, environment, port),
        environment,
    )


def _ranked(launcher: str, names: tuple[str, str, str, str], environment: Environment) -> Place:
    """The place in variables for index, number of processes, and the first one's host and port."""
    number, (rank, size, host, port) = _reader(launcher, environment), names
    address = environment.get(host)
    if not address:
        raise ClusterError(f"{rank} is set, but not {host}, the host of process 0. {_REMEDY}")
    coordinator = _with_port(address, environment, number(port, PORT))
    return _in_slice(launcher, number(rank), number(size), coordinator, environment)


def _cloud_tpu(environment: Environment) -> Place:
    number = _reader("Cloud TPU", environment)
    hosts = _tpu_hosts(environment)
    slices = number("MEGASCALE_NUM_SLICES", 1)
    index = 0 if slices == 1 else number("MEGASCALE_SLICE_ID")
    worker = number("TPU_WORKER_ID")
    if worker >= len(hosts):
        raise ClusterError(f"TPU_WORKER_ID is {worker}, of {len(hosts)} hosts. {_REMEDY}")
    coordinator = hosts[0] if slices == 1 else _megascale_host(environment)
    if not coordinator:
        raise ClusterError("Cloud TPU: MEGASCALE_COORDINATOR_ADDRESS is missing. " + _REMEDY)
    return Place(
        "Cloud TPU",
        index * len(hosts) + worker,
        len(hosts) * slices,
        _with_port(coordinator, environment, PORT),
        index,
        slices,
        hosts if slices == 1 else (),
    )


_LAUNCHERS: dict[str, Callable[[Environment], Place]] = {
    "JOB_COMPLETION_INDEX": _jobset,
    "SLURM_PROCID": _slurm,
    "RANK": functools.partial(
        _ranked, "Ray or torchrun", ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ),
    "JAX_PROCESS_ID": functools.partial(_ranked, "Kubeflow", _KUBEFLOW),
}


def _in_slice(
    launcher: str, process: int, processes: int, coordinator: str, environment: Environment
) -> Place:
    """A place whose processes fill one slice after another."""
    hosts = _tpu_hosts(environment)
    if not hosts:
        slices = _reader(launcher, environment)("MEGASCALE_NUM_SLICES", 1)
        slices = slices if slices and processes % slices == 0 else 1
    else:
        slices, rest = divmod(processes, len(hosts))
        if rest:
            raise ClusterError(
                f"{launcher} says that there are {processes} processes, TPU_WORKER_HOSTNAMES that a"
                f" slice has {len(hosts)} hosts. {_REMEDY}"
            )
        _check_worker(launcher, process % len(hosts), environment)
    index = process * slices // processes if processes else 0
    names = hosts if slices == 1 and len(hosts) == processes else ()
    return Place(launcher, process, processes, coordinator, index, slices, names)


def _check_worker(launcher: str, expected: int, environment: Environment) -> None:
    worker = environment.get("TPU_WORKER_ID")
    if worker is not None and worker != str(expected):
        raise ClusterError(
            f"{launcher} says that this is host {expected} of its slice, TPU_WORKER_ID that it is"
            f" host {worker}. {_REMEDY}"
        )


def _tpu_hosts(environment: Environment) -> tuple[str, ...]:
    """The hosts of the process's slice, in order; none if there is only this one."""
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    hosts = tuple(name.strip().partition(":")[0] for name in names.split(",") if name.strip())
    return () if hosts == ("localhost",) else hosts


def _megascale_host(environment: Environment) -> str:
    """The host of process 0; the port in this variable is that of libtpu."""
    return environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0]


def _with_port(address: str, environment: Environment, port: int) -> str:
    """The address of the coordinator, whose port JAX_COORDINATOR_PORT may set."""
    host, colon, given = address.rpartition(":")
    chosen = environment.get("JAX_COORDINATOR_PORT")
    return f"{host if colon else address}:{chosen or (given if colon else port)}"


def _reader(launcher: str, environment: Environment) -> Callable[..., Any]:
    """A function that reads a number from a variable, or returns a default if there is one."""

    def number(name: str, default: Any = _REQUIRED) -> Any:
        text = environment.get(name)
        if text is None and default is not _REQUIRED:
            return default
        if text is None or not re.fullmatch(r"\d{1,9}", text, re.ASCII):
            what = "is missing" if text is None else f"is {text!r}; it must be a number"
            raise ClusterError(f"{launcher}: {name} {what}. {_REMEDY}")
        return int(text)

    return number
