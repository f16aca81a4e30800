"""A step of training by v4jax and by transformers with torch, on the same weights, in one run.

    python -m benchmarks.compare_training [--lengths 1024 4096] [--output benchmarks/results]

One row of each length, float32, all weights moved by AdamW; `lora` moves attention's adapters. Each
measurement runs in a process of its own. Last comes what a step costs beside its program: a run
whose program does nothing. Prints a line for each, appends JSONL.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import compare

SIDES = ("transformers", "v4jax", "lora")
RATE, DECAY = 1e-4, 0.1
_STEPS = 3  # timed, after one that is not


def main() -> int:
    """Run everything, or one measurement in this process (`--worker`)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--worker", nargs=3, metavar=("SIDE", "MODEL", "LENGTH"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.worker:
        side, model, length = args.worker
        print(json.dumps(_worker(side, Path(model), int(length))))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        make = f"import benchmarks.compare as c; c.make({directory!r})"
        subprocess.run([sys.executable, "-c", make], check=True)
        rows = []
        for length in args.lengths:
            for side in args.sides:
                rows.append(_spawn(side, directory, length))
                print(json.dumps(rows[-1]), flush=True)
        rows.append(_spawn("overhead", directory, 1024))
        print(json.dumps(rows[-1]))
    compare.append(rows, args.output / "compare_training.jsonl")
    return 0


def _spawn(side: str, directory: str, length: int) -> dict[str, Any]:
    words = ["-m", "benchmarks.compare_training", "--worker", side, directory, str(length)]
    done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _worker(side: str, path: Path, length: int) -> dict[str, Any]:
    match side:
        case "transformers":
            found = _transformers(path, length)
        case "overhead":
            found = _overhead(path, length)
        case _:
            found = _v4jax(path, length, lora=side == "lora")
    return {"side": side, "length": length} | found | {"peak_gb": compare.peak_gb()}


def _tokens(length: int) -> Any:
    import numpy as np

    return np.random.default_rng(length).integers(2, 8192, (1, length), np.int32)


def _transformers(path: Path, length: int) -> dict[str, Any]:
    import torch
    from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

    model = DeepseekV4ForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    rule = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    tokens = torch.tensor(_tokens(length), dtype=torch.long)
    times, losses = [], []
    for _ in range(1 + _STEPS):
        began = time.perf_counter()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - began)
    return {"step_s": min(times[1:]), "losses": losses}


def _v4jax(path: Path, length: int, *, lora: bool) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import v4jax
    from v4jax.lora import Lora
    from v4jax.numerics import HF
    from v4jax_train import optimizer, step, trainable
    from v4jax_train.trainable import Full

    loaded = v4jax.load(path, dtype="float32", numerics="hf")
    cfg, what = loaded.config, Lora() if lora else Full()
    parts = trainable.split(loaded.engine.model, cfg, what, jax.random.key(0))
    declared = trainable.declare(cfg, what)
    rule = optimizer.make(declared, cfg, RATE, rule="adamw", weight_decay=DECAY)
    run = step.make(step.Settings(cfg=cfg, numerics=HF, what=what, remat=False), rule)
    state = jax.device_put(step.begin(parts, rule, 0), jax.devices()[0])
    frozen = parts.frozen
    del loaded, parts
    tokens = jnp.asarray(_tokens(length))[None]
    batch = {"tokens": tokens, "trained": tokens >= 0, "document": jnp.ones_like(tokens)}
    times, losses = [], []
    for _ in range(1 + _STEPS):
        began = time.perf_counter()
        state, metrics = run(state, frozen, batch, np.float32(np.inf))
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - began)
    return {"compile_s": times[0], "step_s": min(times[1:]), "losses": losses}


def _overhead(path: Path, length: int) -> dict[str, Any]:
    """Seconds of a step of the whole loop, data and metrics included, without the program."""
    import dataclasses
    import statistics
    from types import SimpleNamespace

    import jax

    from v4jax_train import journal, loop, recipe, step

    rows = path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": "word " * 40 * (1 + i % 9)}) + "\n" for i in range(99))
    )
    table = {
        "out": str(path / "run"),
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
            number, found = count(state.step)
            return dataclasses.replace(state, step=number), found | {
                "tokens_seen": found["loss"] + 1
            }

        # As what `jax.jit` returns: lowered and compiled, it is the program.
        return SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=lambda: run))

    step.make = make
    loop.begin(recipe.from_table(table), show=lambda _: None)
    seconds = [line["seconds"] for line in journal.read(path / "run", "step")[10:]]
    return {"step_s": statistics.median(seconds)}


if __name__ == "__main__":
    sys.exit(main())
