"""Compile functions for accelerators that are not attached.

TPU programs need libtpu (`pip install 'jax[tpu]'`) and `TPU_SKIP_MDS_QUERY=1` in the environment;
GPU programs need the plugin of `jax[cuda13]`, but no driver.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Target = Literal["v5p", "v6e", "tpu7x", "h200"]
TPU_TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# What XLA's compiler needs to know about a GPU; the figures are those of NVIDIA's H200 SXM.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 62914560
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 device_memory_size: 150754820096
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@functools.lru_cache
def devices(target: Target) -> tuple[Any, ...]:
    """Devices to compile for: four TPU chips, or a machine of eight GPUs.

    Raises:
      ValueError: unknown target.
    """
    if target in TPU_TOPOLOGIES:
        name = TPU_TOPOLOGIES[target]
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    elif target == "h200":
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x8", topology="1x1x8", target_config=_H200
        )
    else:
        raise ValueError(f"Unknown target '{target}'; pass one of {[*TPU_TOPOLOGIES, 'h200']}.")
    return tuple(topology.devices)


def lowered(target: Target, function: Callable[..., Any], *structs: Any) -> jax.stages.Lowered:
    """Trace and lower a function for one device.

    Args:
      target: the chip.
      function: a function of trees of arrays.
      structs: its arguments, trees of `jax.ShapeDtypeStruct` without sharding.
    """
    mesh = Mesh(np.array(devices(target)[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*jax.tree.map(placed, structs))


def compiled(target: Target, function: Callable[..., Any], *structs: Any) -> jax.stages.Compiled:
    """Compile a function for one device; arguments as for `lowered`."""
    return lowered(target, function, *structs).compile()


def temporaries(program: jax.stages.Compiled) -> int:
    """Bytes of device memory that a program needs besides its arguments and results."""
    analysis = program.memory_analysis()
    assert analysis is not None, "this compiler reports no memory analysis"
    return analysis.temp_size_in_bytes
