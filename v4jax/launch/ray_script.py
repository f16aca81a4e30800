"""A script for Ray's JaxTrainer, which joins the processes and starts them again."""

from v4jax.launch.job import Job
from v4jax.launch.topology import TPUS

_SCRIPT = '''\
"""{description}"""

import tempfile
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxConfig, JaxTrainer

RECIPE = (
{recipe})
OPTIONS = {options!r}


def train(_: dict) -> None:
    """Run one process of the training; Ray has joined it to the others."""
    from v4jax_train.__main__ import main

    with tempfile.TemporaryDirectory() as directory:
        recipe = Path(directory) / "recipe.toml"
        recipe.write_text(RECIPE, encoding="utf-8")
        status = main([str(recipe), *OPTIONS])
    if status:
        raise RuntimeError(f"v4jax-train ended with status {{status}}.")


if __name__ == "__main__":
    JaxTrainer(
        train,
        train_loop_config={{}},
        jax_config=JaxConfig({accelerator}=True),
        scaling_config=ScalingConfig({scaling}),
        run_config=RunConfig(
            name={name!r},
            failure_config=FailureConfig(max_failures={restarts}),
            worker_runtime_env={{"env_vars": {environment!r}}},
        ),
    ).fit()
'''


def text(job: Job) -> str:
    """The script, which holds the recipe, so that it is all that Ray needs."""
    topology = job.topology
    scaling: dict[str, object] = {"num_workers": job.processes}
    if topology.is_tpu:
        scaling["use_tpu"] = True
        scaling["topology"] = topology.extent
        scaling["accelerator_type"] = TPUS[topology.kind].ray
    elif topology.is_gpu:
        scaling["use_gpu"] = True
        scaling["resources_per_worker"] = {"GPU": topology.chips_per_host}
        scaling["accelerator_type"] = topology.kind.upper()
    return _SCRIPT.format(
        description=job.description,
        recipe="".join(f"    {line!r}\n" for line in job.text.splitlines(keepends=True)) or "''\n",
        options=job.options,
        # Ray joins processes on CPUs only if they are said to have an accelerator.
        accelerator="use_tpu" if topology.is_tpu else "use_gpu",
        scaling=", ".join(f"{key}={value!r}" for key, value in scaling.items()),
        name=job.name,
        restarts=job.restarts,
        environment=job.environment,
    )
