"""A batch script for Slurm."""

import shlex

from v4jax.launch.job import GRACE, MISUSE, Job

# JAX gives each of Slurm's tasks one GPU.
_SCRIPT = """\
#!/bin/bash
# {description}
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
{gpus}#SBATCH --output={name}-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@{grace}

{exports}srun --kill-on-bad-exit=1 {command}
status=$?
# Wrong options stay wrong; anything else is tried again, from the last saved state.
if [ $status -ne 0 ] && [ $status -ne {misuse} ] &&
    [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""


def text(job: Job) -> str:
    """The script; it runs in the directory where it is submitted, which all nodes share."""
    gpus = job.topology.chips_per_host if job.topology.is_gpu else 0
    return _SCRIPT.format(
        description=job.description,
        name=job.name,
        nodes=job.processes,
        tasks=gpus or 1,
        gpus=f"#SBATCH --gpus-per-node={gpus}\n" if gpus else "",
        grace=GRACE,
        exports="".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in job.environment.items()
        ),
        command=shlex.join(job.command(job.recipe, "--distributed")),
        misuse=MISUSE,
        restarts=job.restarts,
    )
