"""The estimated time of a step, and the model behind it.

A step takes as long as its operations at the device's peak rate or its bytes at the bandwidth of
HBM, whichever is longer, and then as long as its collectives: nothing overlaps with them. Within a
step the rates are reached, so that the estimate is a lower bound of what one such program takes.

Devices of a TPU form a torus. A collective's groups are rings along one of its directions, or along
several if they are larger than one; a ring uses its links in both directions. A GPU reaches every
other one of its machine at once. Each collective costs a microsecond for every hop to the farthest
device, which is most of what small ones take.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from v4jax.pods.chips import Chip, Slice
from v4jax.pods.jobs import Move

MODEL = (
    "max(operations / peak, bytes / HBM bandwidth) + collectives, at the vendor's rates, without "
    "overlap of collectives"
)
_HOP = 1e-6  # seconds


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step.

    Attributes:
      compute: operations at the peak rate.
      memory: bytes at the bandwidth of HBM.
      network: collectives.
      mfu: the share of the peak rate that is spent on what the mathematics needs.
    """

    compute: float
    memory: float
    network: float
    mfu: float

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + self.network

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        causes = {"compute": self.compute, "HBM": self.memory, "network": self.network}
        return max(causes, key=causes.__getitem__)


def step(
    where: Slice, *, useful: float, executed: float, nbytes: float, moves: Iterable[Move]
) -> Estimate | None:
    """The time of a step; None if nothing is known about the devices.

    Args:
      where: the devices.
      useful: operations of one device that the mathematics needs.
      executed: operations that it executes.
      nbytes: bytes that it reads and writes in HBM.
      moves: its collectives.
    """
    if (chip := where.chip) is None:
        return None
    compute, memory = executed / chip.flops, nbytes / chip.bandwidth
    network = sum(move.times * seconds(move, where) for move in moves)
    total = max(compute, memory) + network
    return Estimate(compute, memory, network, useful / chip.flops / total if total else 0.0)


def seconds(move: Move, where: Slice) -> float:
    """The time of one collective, once."""
    chip, group = where.chip, move.group or where.devices
    if chip is None or group < 2:
        return 0.0
    rings = _rings(group, where, chip)
    # Both directions of a ring; a GPU's links are one.
    link = 2 * chip.link / chip.devices if chip.is_tpu else chip.link
    latency = _HOP * sum(max(1, ring // 2) for ring in rings)
    share = (group - 1) / group
    match move.kind:
        case "all-to-all" | "ragged-all-to-all":
            # On a ring, bytes pass a quarter of it on average.
            return latency + move.bytes * max(share, max(rings) / 4) / link
        case "collective-permute":
            return latency + 2 * move.bytes / link
        case "all-reduce":
            return latency + 2 * move.bytes * share / (link * len(rings))
    return latency + move.bytes * share / (link * len(rings))


def _rings(group: int, where: Slice, chip: Chip) -> list[int]:
    """The sizes of the rings that a group of devices forms in a slice's directions."""
    if not chip.is_tpu:
        return [2]
    chips, rings = max(2, group // chip.devices), []
    for size in sorted(where.shape, reverse=True):
        if chips > 1 and size > 1:
            rings.append(min(chips, size))
            chips = -(-chips // size)
    return rings or [2]


def hops(mesh: Mesh, shape: tuple[int, ...]) -> dict[str, float]:
    """Mean number of links between neighbours on each axis of a mesh, the torus closed.

    Args:
      mesh: mesh of a TPU's devices.
      shape: chips of the slice in each direction.
    """
    coords = np.array([device.coords for device in mesh.devices.flat])
    coords = coords.reshape(*mesh.devices.shape, -1)
    size = np.array([*shape, *[1] * (coords.shape[-1] - len(shape))])
    means = {}
    for dim, name in enumerate(mesh.axis_names):
        apart = np.abs(np.diff(coords, axis=dim))
        apart = np.minimum(apart, size - apart).sum(-1)
        if apart.size:
            means[name] = float(apart.mean())
    return means
