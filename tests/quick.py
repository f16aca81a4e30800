"""XLA flags that compile CPU programs in a third of the time; users compile without them.

They turn off LLVM's optimisations and choose XLA's plain emitters: most tests run their programs
for less time than full compilation takes. `make test` passes what this file prints to the tests as
`XLA_FLAGS`; those marked `full_compilation` run in processes of their own without it.
"""

import jax

_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# jaxlib 0.11 and later have no plain emitters.
if jax.__version_info__ < (0, 11):
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in _OPTIONS.items())
# For a subprocess, which then has one device.
ENVIRONMENT = {"XLA_FLAGS": FLAGS}

if __name__ == "__main__":
    print(FLAGS)
