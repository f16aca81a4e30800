"""Figures of TPU and GPU devices, and the slices that they come in.

Memory is what the compiler of libtpu 0.0.42 says a program may use; other figures are the
vendors': docs.cloud.google.com/tpu/docs/v5p, v6e and tpu7x; nvidia.com/data-center/h200.
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

from v4jax.facts import GIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a chip; a tpu7x chip has two.

    Attributes:
      name: as in the name of a topology.
      kind: beginning of JAX's `device_kind`.
      memory: bytes that a program may use.
      bandwidth: bytes per second between HBM and the cores.
      flops: dense bfloat16 operations per second.
      link: bytes per second that a link to one neighbour carries in one direction; of a GPU, all
        its links together.
      devices: JAX devices of a chip.
      slices: shapes that are rented, the smallest first.
    """

    name: str
    kind: str
    memory: int
    bandwidth: float
    flops: float
    link: float
    devices: int = 1
    slices: tuple[str, ...] = ()

    @property
    def is_tpu(self) -> bool:
        return self.kind.startswith("TPU")


_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16"),
)
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5p", "TPU v5", int(95.74 * GIB), 2.765e12, 459e12, 100e9, 1, _CUBES),
        Chip("v6e", "TPU v6", int(31.25 * GIB), 1.638e12, 918e12, 100e9, 1, _SQUARES),
        Chip("tpu7x", "TPU7x", int(94.75 * GIB), 3.69e12, 1153e12, 100e9, 2, _CUBES),
        Chip("h200", "NVIDIA H200", 141_000_000_000, 4.8e12, 989e12, 450e9, 1, ("8",)),
    )
}
HERE = "here"


class Slice(NamedTuple):
    """Devices that a job runs on.

    Attributes:
      name: name of the topology, such as 'v6e:2x4', or 'here' for the devices at hand.
      chip: figures of its devices; None if they are unknown, as for a CPU.
      shape: chips in each direction.
      devices: number of JAX devices.
    """

    name: str
    chip: Chip | None
    shape: tuple[int, ...]
    devices: int


def parse(topology: str) -> Slice:
    """The slice of a name such as 'v6e:2x4', 'tpu7x:4x4x8' or 'h200:8'.

    Raises:
      ValueError: there is no such slice.
    """
    match = re.fullmatch(r"(\w+):(\d{1,4}(?:x\d{1,4}){0,2})", topology, re.ASCII)
    chip = CHIPS.get(match[1]) if match else None
    if not match or chip is None:
        known = ", ".join(f"{chip.name}:{chip.slices[-1]}" for chip in CHIPS.values())
        raise ValueError(
            f"'{topology}' is not a slice; give a chip and how many of it there are in each "
            f"direction, such as {known}, or '{HERE}' for the devices of this machine."
        )
    shape = tuple(map(int, match[2].split("x")))
    dims = len(chip.slices[-1].split("x"))
    is_possible = math.prod(shape) <= 8 if not chip.is_tpu else not (math.prod(shape) % 4)
    if len(shape) != dims or 0 in shape or not is_possible:
        raise ValueError(
            f"'{topology}' is not a slice of {chip.name}; the usual ones are "
            f"{', '.join(chip.slices)}."
        )
    return Slice(topology, chip, shape, math.prod(shape) * chip.devices)


def of_devices(devices: list[Any]) -> Slice:
    """The slice of devices that are attached."""
    kind = devices[0].device_kind
    chip = next((chip for chip in CHIPS.values() if kind.startswith(chip.kind)), None)
    if chip is not None and chip.name == "v5p" and "lite" in kind:
        chip = None
    return Slice(HERE, chip, (len(devices),), len(devices))


def slices(names: list[str]) -> list[Slice]:
    """The usual slices of some chips, those with the fewest chips first.

    Raises:
      ValueError: an unknown chip.
    """
    if unknown := [name for name in names if name not in CHIPS]:
        raise ValueError(f"No chip '{unknown[0]}' is known; there are {', '.join(CHIPS)}.")
    found = [parse(f"{name}:{shape}") for name in names for shape in CHIPS[name].slices]
    return sorted(found, key=lambda part: math.prod(part.shape))
