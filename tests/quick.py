"""Programs for hosts compiled in a third of the time: not as for users.

Without LLVM's optimisations and by XLA's plain emitters: most tests run their programs for less
time than they would take to compile. `make test` gives what this file prints to these tests as
`XLA_FLAGS`; those marked `full_compilation` run in processes of their own without it.
"""

import jax

_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# From jaxlib 0.11 on there are no plain emitters.
if jax.__version_info__ < (0, 11):
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in _OPTIONS.items())
# Of a process, which then has one device.
ENVIRONMENT = {"XLA_FLAGS": FLAGS}

if __name__ == "__main__":
    print(FLAGS)
