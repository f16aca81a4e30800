"""What a plan needs to know of a job, be it serving or training.

A job says which arrays its program takes on a mesh, and what the mathematics and the mesh ask of a
device. The program itself is only lowered, and compiled, for the meshes that these figures favour.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from v4jax.model import sharding
from v4jax.model.config import ModelConfig
from v4jax.model.sharding import AXES, AnyMesh
from v4jax.traffic import Experts


class Move(NamedTuple):
    """Collectives of a step: their kind, devices in each group, bytes of each, and number."""

    kind: str
    group: int
    bytes: float
    times: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a step asks of a device, from arithmetic.

    Attributes:
      flops: operations that the mathematics needs, without recomputation.
      executed: operations that the program executes.
      bytes: bytes read and written in HBM.
      temporaries: bytes of activations and of other arrays that live within a step.
      moves: collectives.
      experts: how busy the device's experts are.
      tokens: tokens of a step on all devices.
    """

    flops: float
    executed: float
    bytes: float
    temporaries: float
    moves: tuple[Move, ...]
    experts: Experts
    tokens: int


class Job(Protocol):
    """A program that can be planned for any mesh.

    Attributes:
      name: 'decode', 'prefill', 'train-lora', 'train-muon' or 'train-adamw'.
      cfg: the model's configuration.
      rows: rows of a batch that devices share.
      compiler_options: XLA's options.
    """

    @property
    def name(self) -> str: ...

    @property
    def cfg(self) -> ModelConfig: ...

    @property
    def rows(self) -> int: ...

    @property
    def compiler_options(self) -> dict[str, Any]: ...

    def sizes(self) -> dict[str, int]:
        """The sizes that the user chose, by the name of their option."""
        ...

    def arguments(self, mesh: AnyMesh) -> dict[str, Any]:
        """Abstract arrays with shardings, by what they are: 'weights', 'cache', 'optimizer' ...

        Raises:
          ValueError: the mesh does not divide the weights or the batch.
        """
        ...

    def work(self, mesh: AnyMesh, arguments: dict[str, Any]) -> Work:
        """What a step asks of a device of the mesh."""
        ...

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The program, lowered for the mesh's devices."""
        ...


def on_each(rows: int, mesh: AnyMesh) -> int:
    """The rows of a batch that a device computes."""
    groups = sharding.row_groups(mesh)
    return rows // groups if rows % groups == 0 else rows


def expected(cfg: ModelConfig, tokens: int, mesh: AnyMesh) -> Experts:
    """How busy experts are that get as many tokens as the others.

    Args:
      cfg: the model's configuration.
      tokens: tokens on each device.
      mesh: the mesh.
    """
    shared = tokens * sharding.row_groups(mesh) // mesh.shape[AXES[0]]
    chosen, experts = cfg.num_experts_per_tok, cfg.n_routed_experts
    active = 1 - (1 - chosen / experts) ** shared
    return Experts(active, max(1, math.ceil(shared * chosen / sharding.ways("experts", mesh))))


def exchange(cfg: ModelConfig, tokens: int, mesh: AnyMesh, passes: int) -> tuple[Move, ...]:
    """The collectives of all layers that move activations.

    Args:
      cfg: the model's configuration.
      tokens: tokens on each device.
      mesh: the mesh.
      passes: how often a layer runs, forward and backward.
    """
    layers, width = len(cfg.layers), 2 * cfg.hidden_size
    times, moves = layers * passes, []
    if (group := sharding.ways("experts", mesh)) > 1:
        # Tokens go to their experts, and results come back.
        moves.append(Move("all-to-all", group, tokens * cfg.num_experts_per_tok * width, 2 * times))
    if (tensor := mesh.shape["tensor"]) > 1:
        # The sums of attention's and the shared expert's results.
        moves.append(Move("all-reduce", tensor, 2 * tokens * width, 2 * times))
    return tuple(moves)


def layer_bytes(cfg: ModelConfig, tokens: int, mesh: AnyMesh) -> float:
    """Bytes of the activations of one layer on a device: queries, streams and experts' rows."""
    heads = cfg.num_attention_heads * cfg.head_dim / mesh.shape["tensor"]
    experts = cfg.num_experts_per_tok * (3 * cfg.moe_intermediate_size + 2 * cfg.hidden_size)
    return 2.0 * tokens * (3 * heads + 3 * cfg.hc_mult * cfg.hidden_size + experts)
