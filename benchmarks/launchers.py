"""A LoRA run of the small model on two processes, started by a file of `v4jax launch`.

python -m benchmarks.launchers ray runs/ray      # needs ray[default,train]
python -m benchmarks.launchers slurm runs/slurm  # needs a Slurm cluster of two nodes
python -m benchmarks.launchers ssh runs/ssh --hosts a,b

Everything runs on this machine, as nodes of one Slurm cluster can. One process is killed once a
state is saved, and the launcher starts the run again. Its losses must be those of two processes
that nothing interrupts, bit for bit.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from v4jax_train import journal

STEPS, KILLED_AFTER, TIMEOUT = 40, 20, 1200
RECIPE = f"""\
[model]
dtype = "float32"
[data]
seq_len = 256
[adapter]
rank = 8
alpha = 16.0
[optimizer]
rate = 1e-3
[steps]
steps = {STEPS}
batch = 4
[checkpoints]
every = 10
[mesh]
fsdp = 2
"""


def is_second(process: psutil.Process) -> bool:
    """Whether it is the second process of a run that a launcher started."""
    try:
        command = process.cmdline()
        words, name = " ".join(command), command[0] if command else ""
        if name.startswith("ray::"):
            return "RayTrainWorker" in words
        if "v4jax-train" not in words or "python" not in name:
            return False
        return process.environ().get("SLURM_PROCID") == "1" or words.endswith("--process 1")
    except psutil.Error:
        return False


def wait(run: Path, step: int, launched: subprocess.Popen[bytes] | None = None) -> None:
    """Wait for a state of the run."""
    end = time.monotonic() + TIMEOUT
    while not (run / "states" / str(step)).is_dir():
        if time.monotonic() > end or (launched is not None and launched.poll()):
            raise SystemExit(f"There is no state of step {step} in {run}.")
        time.sleep(0.2)


def losses(run: Path) -> list[float]:
    """The losses of a run's steps."""
    return [line["loss"] for line in journal.read(run, "step")]


def reference(arguments: list[str], out: Path) -> None:
    """Run two processes without a launcher."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
    command = [sys.executable, "-m", "v4jax_train", *arguments, "--out", str(out), *place]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [subprocess.Popen([*command, str(i)], env=environment) for i in range(2)]
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit("The run without a launcher failed.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("launcher", choices=("ray", "slurm", "ssh"))
    parser.add_argument("out", type=Path, help="directory to create")
    parser.add_argument("--hosts", help="for ssh: two names of this machine")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True)
    rows = ({"text": "the cat sat on the mat " * (1 + i % 9)} for i in range(200))
    (out / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (out / "recipe.toml").write_text(RECIPE)
    data = ["--model", "tiny", "--data", str(out / "data.jsonl")]
    arguments = [str(out / "recipe.toml"), *data]
    reference(arguments, out / "uninterrupted")

    run = out / args.launcher
    options = ["--on", args.launcher, "--topology", "cpu:2x1", "--out", str(run)]
    options += ["--hosts", args.hosts] if args.hosts else []
    if args.launcher == "ray":
        start = ["ray", "start", "--head", "--num-cpus=2", "--disable-usage-stats"]
        subprocess.run(start, check=True)
    launched = subprocess.Popen([sys.executable, "-m", "v4jax", "launch", *arguments, *options])
    wait(run, KILLED_AFTER, launched)
    second = [process for process in psutil.process_iter() if is_second(process)][-1]
    print(f"Killing {second.pid}: {second.name()}", flush=True)
    second.kill()
    wait(run, STEPS)
    launched.wait()
    if args.launcher == "ray":
        subprocess.run(["ray", "stop"], check=True)
    starts = len({line["start"]["began"] for line in journal.read(run, "time")})
    equal = losses(run) == losses(out / "uninterrupted")
    print(f"{len(losses(run))} steps, {starts} starts; the same losses, bit for bit: {equal}")


if __name__ == "__main__":
    main()
