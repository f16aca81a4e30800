"""Programs for hosts compiled in a third of the time: not as for users.

Without LLVM's optimisations and by XLA's plain emitters: for whole models that run for less time
than they would take to compile.
"""

import jax

# From jaxlib 0.11 on there are no plain emitters.
OPTIONS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
# Of a process, which then has one device.
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": FLAGS}
