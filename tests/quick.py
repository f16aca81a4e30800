"""Programs for hosts compiled in a third of the time: not as for users.

Without LLVM's optimisations and by XLA's plain emitters: for whole models that run for less time
than they would take to compile.
"""

FLAG = "xla_cpu_use_fusion_emitters"
# Of a process, which then has one device.
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": f"--{FLAG}=false"}
