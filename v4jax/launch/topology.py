"""Topologies: the hosts and devices of a TPU slice, or of nodes with GPUs or CPUs."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
      gke: GKE's name of it, a value of the label cloud.google.com/gke-tpu-accelerator.
      ray: Ray's name of it.
      devices: devices that JAX sees on a chip.
    """

    gke: str
    ray: str
    devices: int = 1


TPUS = {
    "v5p": Chip("tpu-v5p-slice", "TPU-V5P"),
    "v6e": Chip("tpu-v6e-slice", "TPU-V6E"),
    "tpu7x": Chip("tpu7x", "TPU-V7X", devices=2),
}
GPUS = ("h100", "h200", "b200")
CPU = "cpu"
_CHIPS_PER_HOST = 4
_GPUS_PER_NODE = 8
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LARGEST = (16, 16, 24)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice, or nodes.

    Attributes:
      kind: a key of `TPUS`, one of `GPUS`, or 'cpu'.
      shape: chips of a slice along its axes; or nodes, and devices of each.
    """

    kind: str
    shape: Shape

    def __str__(self) -> str:
        """As `read` takes it."""
        return f"{self.kind}:{self.extent}"

    @property
    def extent(self) -> str:
        """The shape, such as 4x4x8."""
        return "x".join(map(str, self.shape))

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU slice."""
        return self.kind in TPUS

    @property
    def is_gpu(self) -> bool:
        """Whether its nodes have GPUs."""
        return self.kind in GPUS

    @property
    def chips(self) -> int:
        """Number of chips or, on nodes, of devices."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Number of hosts or nodes."""
        return self.chips // self.chips_per_host

    @property
    def chips_per_host(self) -> int:
        """Number of chips of a host; hosts with 8 of v6e are a slice by themselves."""
        if not self.is_tpu:
            return self.shape[1]
        return self.chips if len(self.shape) == 2 and self.chips <= 8 else _CHIPS_PER_HOST

    @property
    def devices(self) -> int:
        """Number of devices that JAX sees."""
        return self.chips * (TPUS[self.kind].devices if self.is_tpu else 1)


def read(text: str) -> Topology:
    """The topology in a text such as 'v5p:4x4x8', 'h200:2x8' or 'cpu:2x1'.

    Raises:
      ValueError: there is no such topology.
    """
    kind, _, extent = text.partition(":")
    if kind not in (*TPUS, *GPUS, CPU):
        raise ValueError(
            f"--topology {text}: begin with one of {', '.join(TPUS)} and the shape of a slice, as"
            f" in v5p:4x4x8, or with one of {', '.join((*GPUS, CPU))} and NODESxDEVICES, as in"
            " h200:2x8."
        )
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})+", extent, re.ASCII):
        example = "4x4" if kind == "v6e" else "4x4x8" if kind in TPUS else "2x8"
        raise ValueError(f"--topology {text}: give sizes after the colon, as in {kind}:{example}.")
    topology = Topology(kind, tuple(map(int, extent.split("x"))))
    if topology.is_tpu:
        _check_slice(topology)
    elif len(topology.shape) != 2:
        raise ValueError(f"--topology {text}: give NODESxDEVICES, as in {kind}:2x8.")
    elif topology.is_gpu and topology.chips_per_host > _GPUS_PER_NODE:
        raise ValueError(f"--topology {text}: a node has at most {_GPUS_PER_NODE} GPUs.")
    return topology


def shapes(kind: str) -> Iterator[Shape]:
    """Shapes of the slices of a kind of TPU."""
    if kind == "v6e":
        yield from _FLAT
        return
    yield from _SMALL
    steps = (range(4, largest + 1, 4) for largest in _LARGEST)
    yield from (shape for shape in itertools.product(*steps) if list(shape) == sorted(shape))


def _check_slice(topology: Topology) -> None:
    known = list(shapes(topology.kind))
    if topology.shape in known:
        return
    by_size = sorted(known, key=math.prod)
    # Of equally large ones the most compact.
    enough = [shape for shape in by_size if math.prod(shape) >= topology.chips] or by_size[-1:]
    least = math.prod(enough[0])
    nearest = min((shape for shape in enough if math.prod(shape) == least), key=max)
    raise ValueError(
        f"--topology {topology}: {topology.kind} has no such slice; the nearest is"
        f" {Topology(topology.kind, nearest)}."
    )
