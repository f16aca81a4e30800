"""v4jax and transformers side by side on the same weights, in one run.

    python -m benchmarks.compare [--lengths 512 2048 8192] [--output benchmarks/results]

Each measurement runs in its own process, sides alternating: the machine's speed drifts over hours,
and peak memory is per process. Prints a table and appends JSONL.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("transformers", "v4jax")
DECODE_STEPS = 48


def main() -> int:
    """Run everything, or one measurement in this process (`--worker`)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--worker", nargs=3, metavar=("SIDE", "MODEL", "LENGTH"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    # A cold start includes compilation.
    os.environ["V4JAX_CACHE"] = "off"
    if args.worker:
        side, model, length = args.worker
        print(json.dumps(_worker(side, Path(model), int(length))))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [sys.executable, "-c", f"import benchmarks.compare as c; c.make({directory!r})"],
            check=True,
        )
        bandwidth = _spawn("bandwidth", directory, 0)["gb_per_second"]
        print(f"memory read bandwidth: {bandwidth:.1f} GB/s")
        rows = [_spawn(side, directory, length) for length in args.lengths for side in args.sides]
        for side in args.sides:
            rows.append(_spawn(f"cold-{side}", directory, 16))
    _report(rows, bandwidth)
    append(rows, args.output / "compare.jsonl", bandwidth_gb_s=bandwidth)
    return 0


def make(directory: str) -> None:
    """Write the bench configuration with random weights, as transformers saves it."""
    import torch
    from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

    from v4jax import presets

    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**presets.get_json("bench"))).float()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(torch.rand(len(buffer), 32).argsort(-1)[:, : buffer.shape[1]])
    model.save_pretrained(directory)


def _spawn(side: str, directory: str, length: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.compare", "--worker", side, directory, str(length)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def _worker(side: str, path: Path, length: int) -> dict[str, Any]:
    if side == "bandwidth":
        return _bandwidth()
    if side.startswith("cold-"):
        return _cold_start(side.removeprefix("cold-"), path, length)
    measure = {"transformers": _transformers, "v4jax": _v4jax}[side]
    return {"side": side, "length": length} | measure(path, length) | {"peak_gb": peak_gb()}


def peak_gb() -> float:
    """Peak memory of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _bandwidth() -> dict[str, Any]:
    """The best of several 256 MB reads on all cores."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((65536, 1024), jnp.float32)
    read = jax.jit(lambda x: jnp.sum(x, axis=0))
    jax.block_until_ready(read(x))
    best = min(_timed(lambda: jax.block_until_ready(read(x))) for _ in range(20))
    return {"gb_per_second": x.nbytes / best / 1e9}


def _timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _prompt(length: int) -> list[int]:
    import numpy as np

    return np.random.default_rng(length).integers(2, 8192, length).tolist()


def _transformers(path: Path, length: int) -> dict[str, Any]:
    import torch
    from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

    model = DeepseekV4ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.tensor([_prompt(length)])
    with torch.no_grad():
        if length <= 2048:
            model(tokens, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        out = model(tokens, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        times = []
        for _ in range(DECODE_STEPS):
            start = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            times.append(time.perf_counter() - start)
    return {"prefill_s": prefill, "decode_ms": 1e3 * sorted(times)[len(times) // 2]}


def _v4jax(path: Path, length: int) -> dict[str, Any]:
    import v4jax

    model = v4jax.load(path, dtype="float32", numerics="hf")
    timings = []
    for _ in range(3):
        new = model.generate(_prompt(length), max_tokens=2 * DECODE_STEPS, temperature=0.0)
        timings.append(new.timings)
    return {
        "prefill_s": min(one.prefill_seconds for one in timings[1:]),
        "decode_ms": 1e3 / max(one.tokens_per_second for one in timings[1:]),
        "decode_bytes": _decode_bytes(model.config, length),
    }


def _decode_bytes(cfg: Any, length: int) -> int:
    """Float32 bytes that one token has to read: active weights, windows, entries, index keys."""
    from v4jax.commands import inspect

    total = 4 * inspect.report(cfg).active
    for layer in cfg.layers:
        total += 4 * min(length, cfg.sliding_window) * cfg.head_dim
        if layer.attention == "hca":
            total += 4 * (length // layer.ratio) * cfg.head_dim
        if layer.attention == "csa":
            entries = length // layer.ratio
            total += 4 * min(entries, cfg.index_topk) * cfg.head_dim
            total += 4 * entries * cfg.index_head_dim if entries > cfg.index_topk else 0
    return total


def _cold_start(side: str, path: Path, length: int) -> dict[str, Any]:
    """From import to the first token, including compilation."""
    start = time.perf_counter()
    if side == "v4jax":
        import v4jax

        model = v4jax.load(path, dtype="float32", numerics="hf")
        model.generate(_prompt(length), max_tokens=1, temperature=0.0)
    else:
        import torch
        from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

        theirs = DeepseekV4ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            theirs(torch.tensor([_prompt(length)]), use_cache=True)
    return {"side": side, "length": length, "cold_start_s": time.perf_counter() - start}


def _report(rows: list[dict[str, Any]], bandwidth: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "side", "tokens", "prefill s", "decode ms", "peak GB", "of bandwidth", "cold start s"
    )
    cell = lambda row, key, form: format(row[key], form) if key in row else ""
    for row in rows:
        share = ""
        if "decode_bytes" in row:
            share = f"{row['decode_bytes'] / row['decode_ms'] / 1e6 / bandwidth:.0%}"
        table.add_row(
            row["side"],
            str(row["length"]),
            cell(row, "prefill_s", ".2f"),
            cell(row, "decode_ms", ".2f"),
            cell(row, "peak_gb", ".2f"),
            share,
            cell(row, "cold_start_s", ".1f"),
        )
    console = Console(width=100)
    console.print(table)
    by_key = {(row["side"], row["length"]): row for row in rows if "decode_ms" in row}
    for length in sorted({length for _, length in by_key}):
        pair = [by_key.get((side, length)) for side in SIDES]
        if pair[0] and pair[1]:
            ratio = lambda key, pair=pair: pair[0][key] / pair[1][key]
            console.print(
                f"{length} tokens, transformers / v4jax: prefill {ratio('prefill_s'):.1f}x, "
                f"decode {ratio('decode_ms'):.1f}x, peak memory {ratio('peak_gb'):.1f}x"
            )


def tunables() -> dict[str, str]:
    """Memory settings of this process, which affect its speed."""
    settings = os.environ.get("GLIBC_TUNABLES")
    return {"glibc_tunables": settings} if settings else {}


def append(rows: list[dict[str, Any]], file: Path, **shared: Any) -> None:
    """Append rows to a file, each with the commit and machine it was measured on."""
    import jax

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    shared = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "jax": jax.__version__,
        "machine": f"{platform.machine()}, {platform.python_version()}",
    } | shared
    shared |= tunables()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        for row in rows:
            lines.write(json.dumps(shared | row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
