"""A training step of v4jax and of transformers with torch, on the same weights, in one run.

    python -m benchmarks.compare_training [--lengths 1024 4096] [--output benchmarks/results]

One row of each length in float32, all weights trained with AdamW; `lora` trains attention adapters.
More sides run only when named by `--sides`: `-unrolled` (`steps.unroll` of a recipe), `-bfloat16`
(weights in bfloat16) and `transformers-large_pages`. v4jax's sides always run in the environment
that `v4jax-train` sets for itself; transformers does only in the last.
Each side is its own process, and all must fit into memory together: the default three fit into
24 GB at 4096 tokens. They step in turn, because a machine's speed may change from minute to minute.
A turn is two steps, of which the second counts: training steps follow one another.
Finally measures a step's overhead outside its program, with a program that does nothing.
Prints a line for each side and appends JSONL.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import compare
from v4jax_train.__main__ import LARGE_PAGES

SIDES = ("transformers", "v4jax", "lora")
MORE = (
    "transformers-large_pages",
    "v4jax-unrolled",
    "v4jax-bfloat16",
    "lora-unrolled",
    "lora-bfloat16",
    "lora-bfloat16-unrolled",
)
RATE, DECAY = 1e-4, 0.1
_TURNS = 5  # timed, after an untimed one

# Runs one step and returns its measurements.
Step = Callable[[], dict[str, float]]


def main() -> int:
    """Run everything, or one measurement in this process (`--worker`)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--sides", nargs="+", choices=SIDES + MORE, default=list(SIDES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--worker", nargs=3, metavar=("SIDE", "MODEL", "LENGTH"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    # Every process compiles its step.
    os.environ["V4JAX_CACHE"] = "off"
    if args.worker:
        side, model, length = args.worker
        _worker(side, Path(model), int(length))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        make = f"import benchmarks.compare as c; c.make({directory!r})"
        subprocess.run([sys.executable, "-c", make], check=True)
        output = args.output / "compare_training.jsonl"
        for length in args.lengths:
            compare.append(_in_turn(args.sides, directory, length), output)
        compare.append(_in_turn(["overhead"], directory, 1024), output)
    return 0


def _in_turn(sides: list[str], directory: str, length: int) -> list[dict[str, Any]]:
    """One row per side; only one side computes at a time."""
    workers, measured = [], []
    try:
        for side in sides:
            words = ["-m", "benchmarks.compare_training", "--worker", side, directory, str(length)]
            words, pipe = [sys.executable, *words], subprocess.PIPE
            plain = side == "transformers"
            env = dict(os.environ) if plain else LARGE_PAGES | os.environ
            workers.append(subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=env))
            measured.append([_ask(workers[-1])])
        for _ in range(_TURNS):
            for worker, steps in zip(workers, measured, strict=True):
                steps.append(_ask(worker))
        rows = []
        for side, worker, steps in zip(sides, workers, measured, strict=True):
            peak, _ = worker.communicate()
            times = [step["seconds"] for step in steps]
            row = {"side": side, "length": length, "first_s": steps[0]["before"]}
            row |= {"step_s": min(times[1:]), "median_s": statistics.median(times[1:])}
            row["losses"] = [step["loss"] for step in steps if "loss" in step]
            rows.append(row | json.loads(peak))
            print(json.dumps(rows[-1]), flush=True)
        return rows
    finally:
        for worker in workers:
            worker.kill()


def _ask(worker: Any) -> dict[str, float]:
    """Let a worker take its turn."""
    worker.stdin.write("\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        killed = worker.wait() == -signal.SIGKILL
        reason = "killed, probably out of memory: pass fewer --sides" if killed else "see above"
        sys.exit(f"compare_training: a side exited before finishing its step ({reason}).")
    return json.loads(answer)


def _worker(side: str, path: Path, length: int) -> None:
    """Run two steps per input line, then print the peak memory."""
    name, _, options = side.partition("-")
    match name:
        case "transformers":
            step = _transformers(path, length)
        case "overhead":
            step = _overhead(path, length)
        case _:
            step = _v4jax(path, length, name == "lora", options)
    for _ in sys.stdin:
        # By the second step the other side's threads are idle and freed memory is back in use.
        before, result = _timed(step), _timed(step)
        print(json.dumps(result | {"before": before["seconds"]}), flush=True)
    print(json.dumps({"peak_gb": compare.peak_gb()} | compare.tunables()))


def _timed(step: Step) -> dict[str, float]:
    start = time.perf_counter()
    result = step()
    return {"seconds": time.perf_counter() - start} | result


def _tokens(length: int) -> Any:
    import numpy as np

    return np.random.default_rng(length).integers(2, 8192, (1, length), np.int32)


def _transformers(path: Path, length: int) -> Step:
    import torch
    from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

    model = DeepseekV4ForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    rule = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    tokens = torch.tensor(_tokens(length), dtype=torch.long)

    def run() -> dict[str, float]:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad()
        return {"loss": loss.item()}

    return run


def _v4jax(path: Path, length: int, lora: bool, options: str) -> Step:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import v4jax
    from v4jax.adapters.lora import Lora
    from v4jax.model.numerics import HF
    from v4jax_train import optimizer, step, trainable
    from v4jax_train.trainable import Full

    dtype = "bfloat16" if "bfloat16" in options else "float32"
    loaded = v4jax.load(path, dtype=dtype, numerics="hf")
    cfg, what = loaded.config, Lora() if lora else Full()
    parts = trainable.split(loaded.weights, cfg, what, jax.random.key(0))
    declared = trainable.declare(cfg, what)
    rule = optimizer.make(declared, cfg, RATE, rule="adamw", weight_decay=DECAY)
    settings = step.Settings(
        cfg=cfg, numerics=HF, what=what, remat="light", unroll="unrolled" in options
    )
    program = step.make(settings, rule)
    state = jax.device_put(step.begin(parts, rule, 0), jax.devices()[0])
    frozen = parts.frozen
    del loaded, parts
    tokens = jnp.asarray(_tokens(length))[None]
    batch = {"tokens": tokens, "trained": tokens >= 0, "document": jnp.ones_like(tokens)}

    def run() -> dict[str, float]:
        nonlocal state
        state, metrics = program(state, frozen, batch, np.float32(np.inf))
        jax.block_until_ready(state)
        return {"loss": float(metrics["loss"])}

    return run


def _overhead(path: Path, length: int) -> Step:
    """Runs of 300 steps of the training loop, data and metrics included, with an empty program."""
    import dataclasses
    import itertools
    from types import SimpleNamespace

    import jax

    from v4jax_train import journal, loop, recipe, step

    rows = path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": "word " * 40 * (1 + i % 9)}) + "\n" for i in range(99))
    )
    table = {
        "model": {"path": "tiny", "dtype": "float32"},
        "data": {"files": [str(rows)], "seq_len": length},
        "adapter": {},
        "steps": {"steps": 300},
        "checkpoints": {"every": 1000},
    }
    names = ("loss", "balance_loss", "gradient_norm", "load_violation", "skipped", "tokens_trained")

    def make(*_: Any, **__: Any) -> Any:
        metrics = lambda count: dict.fromkeys((*names, "tokens_seen"), count * 0.0)
        count = jax.jit(lambda n: (n + 1, metrics(n.astype("float32") + 1)), donate_argnums=0)

        def run(state: Any, *_: Any) -> Any:
            number, values = count(state.step)
            return dataclasses.replace(state, step=number), values | {
                "tokens_seen": values["loss"] + 1
            }

        # Like the result of `jax.jit`, it is lowered and compiled before it runs.
        return SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=lambda: run))

    step.make = make
    numbers = itertools.count()

    def measure() -> dict[str, float]:
        out = path / f"run-{next(numbers)}"
        loop.begin(recipe.from_table(table | {"out": str(out)}), show=lambda _: None)
        seconds = [line["seconds"] for line in journal.read(out, "step")[10:]]
        return {"seconds": statistics.median(seconds)}

    return measure


if __name__ == "__main__":
    sys.exit(main())
