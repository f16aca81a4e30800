"""A script that starts a process on each host by ssh."""

import shlex

from v4jax.launch.job import MISUSE, PORT, Job

_SCRIPT = """\
#!/bin/bash
# {description}
hosts=({hosts})
directory=$(printf %q "$PWD")
command={command}

echo "Process 0 writes to {name}-0.log, and so on."
trap 'kill "${{processes[@]}}" 2>/dev/null; exit 1' INT TERM
for attempt in $(seq 0 {restarts}); do
  processes=() status=0
  for i in "${{!hosts[@]}}"; do
    # With a terminal, the remote process ends when ssh does.
    ssh -tt "${{hosts[i]}}" \\
      "cd $directory && exec $command --process $i >>{name}-$i.log 2>&1" </dev/null &
    processes+=($!)
  done
  for process in "${{processes[@]}}"; do
    wait "$process" || status=$?
  done
  # Wrong options stay wrong; anything else is tried again, from the last saved state.
  if [ $status -eq 0 ] || [ $status -eq {misuse} ]; then
    break
  fi
done
exit $status
"""


def text(job: Job) -> str:
    """The script; the hosts share the directory where it is started."""
    coordinator = job.hosts[0].rpartition("@")[2]
    place = ["--coordinator", f"{coordinator}:{PORT}", "--processes", str(job.processes)]
    environment = dict(job.environment)
    if job.slices > 1:
        environment["MEGASCALE_NUM_SLICES"] = str(job.slices)
    variables = ["env", *(f"{name}={value}" for name, value in environment.items())]
    command = shlex.join([*variables, *job.command(job.recipe, *place)])
    return _SCRIPT.format(
        description=job.description,
        name=job.name,
        hosts=shlex.join(job.hosts),
        command=shlex.quote(command),
        restarts=job.restarts,
        misuse=MISUSE,
    )
