"""A task for SkyPilot: one TPU slice, or nodes with GPUs."""

import shlex

from v4jax.launch import documents
from v4jax.launch.job import PORT, SAVED, Job

_RECIPE = "/tmp/recipe.toml"
# SkyPilot counts cores of v5p, of which a chip has two, and chips of v6e.
_COUNTED = {"v5p": 2, "v6e": 1}


def text(job: Job) -> str:
    """The task, as YAML."""
    topology = job.topology
    if topology.is_tpu:
        count = topology.chips * _COUNTED[topology.kind]
        accelerators = f"tpu-{topology.kind}-{count}"
        place = "--distributed"
    else:
        accelerators = f"{topology.kind.upper()}:{topology.chips_per_host}"
        place = (
            f'--coordinator "$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{PORT}"'
            ' --processes "$SKYPILOT_NUM_NODES" --process "$SKYPILOT_NODE_RANK"'
        )
    recovery = {"max_restarts_on_errors": job.restarts, "recover_on_exit_codes": [SAVED]}
    extra = "tpu" if topology.is_tpu else "gpu"
    task = {
        "name": job.name,
        "resources": {
            "accelerators": accelerators,
            **({"image_id": f"docker:{job.image}"} if job.image else {}),
            "job_recovery": recovery,
        },
        "num_nodes": 1 if topology.is_tpu else topology.hosts,
        **({} if job.image else {"setup": f"pip install 'v4jax[train,{extra}]'"}),
        "run": f"printf %s {shlex.quote(job.text)} > {_RECIPE}\n"
        f"{shlex.join(job.command(_RECIPE))} {place}\n",
    }
    return documents.dump(task)
