"""A load on a server, and the same on its engine without HTTP, in one run.

    python -m benchmarks.serve [--model bench] [--loads plain shared turns aborts open prefix]
    python -m benchmarks.serve --url http://127.0.0.1:8000 --served-model NAME

In a closed loop a number of clients each send a request once their last one is answered; in an open
loop requests arrive at random, at half the rate that the closed one reached. The server and the
engine take turns, in several rounds. Prints a table, appends JSONL and draws it. With --url, a
server that runs is measured alone.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.compare import append

QUANTILES = (50, 90, 99)
LATENCIES = {
    "first_token": "to the first token",
    "inter_token": "between tokens",
    "end_to_end": "to the end",
}
# Ids that are neither special nor beyond a small vocabulary.
IDS = (300, 1000)
# New tokens of an answer, with the prompt's tokens that the cache had once they are known.
Piece = tuple[list[int], int]
# Continues a prompt by at most so many tokens.
Target = Callable[[list[int], int], AsyncGenerator[Piece]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What clients do.

    Attributes:
      name: name of the load.
      clients: clients at the same time; in an open loop, those of the closed one before it.
      is_open: whether requests arrive at random.
      conversations: conversations of each client.
      turns: requests of a conversation, each with all tokens of those before it.
      shared: tokens that all prompts begin with.
      new: tokens that each turn adds.
      answer: tokens of an answer.
      leave: every how many requests the client leaves in the middle of the answer; 0 for never.
    """

    name: str
    clients: int
    is_open: bool = False
    conversations: int = 2
    turns: int = 1
    shared: int = 0
    new: int = 128
    answer: int = 128
    leave: int = 0


def loads(names: list[str], clients: int) -> list[Load]:
    """The loads of these names; the plain one also with fewer clients."""
    every = [Load(name="plain", clients=n) for n in (1, 4, 16, 64) if n < clients]
    every += [
        Load(name="plain", clients=clients),
        Load(name="open", clients=clients, is_open=True),
        Load(name="shared", clients=clients, shared=1024),
        Load(name="turns", clients=clients, conversations=1, turns=4),
        Load(name="aborts", clients=clients, leave=4),
        # The first request of each round reads the whole prompt, the others find most of it.
        Load(name="prefix", clients=1, conversations=8, shared=8192, answer=16),
    ]
    return [load for load in every if load.name in names]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A request and what came of it; times in seconds since its start."""

    ids: list[int]
    prompt: int
    cached: int
    first_token: float
    end_to_end: float
    is_left: bool

    @property
    def inter_token(self) -> float:
        """Mean time between tokens."""
        return (self.end_to_end - self.first_token) / max(1, len(self.ids) - 1)


def main() -> int:
    """Measure, print, append and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["plain", "open", "shared", "turns", "aborts", "prefix"]
    parser.add_argument("--loads", nargs="+", choices=names, default=names)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", default="bench", help="a preset with random weights, or a path")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--context", type=int, default=12288)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--speculate", metavar="mtp:N")
    parser.add_argument("--url", help="measure this server only")
    parser.add_argument("--served-model", default="bench", help="name of that server's model")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--png", type=Path, default=Path("benchmarks/serve.png"))
    args = parser.parse_args()
    every = loads(args.loads, args.clients)
    with contextlib.ExitStack() as stack:
        if args.url:
            targets = {"server": over_http(args.url, args.served_model)}
        else:
            targets = _both(args, stack)
        rows = asyncio.run(_measure_all(targets, every, args.rounds))
    append(rows, args.output / "serve.jsonl", model=args.model, speculate=args.speculate)
    draw(rows, args.png)
    return 0


def _both(args: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Target]:
    """A server in a process of its own, and an engine in this one."""
    import v4jax
    from v4jax import presets
    from v4jax.checkpoints import random_release
    from v4jax.engine.engine import Engine

    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    path = args.model
    if path in presets.names() and path != "tiny":
        path = str(directory / path)
        random_release.make_checkpoint(Path(path), presets.get(args.model), 0)
    url = stack.enter_context(_server(path, args, directory / "log"))
    sizes = {"max_seqs": args.clients, "context": args.context, "speculate": args.speculate}
    model = v4jax.load(path, dtype=args.dtype)
    engine = stack.enter_context(Engine(model, **sizes))
    targets = {"server": over_http(url, Path(path).name)}
    return targets | {"engine": on_engine(engine, model.config.eos_token_ids)}


@contextlib.contextmanager
def _server(path: str, args: argparse.Namespace, log: Path) -> Iterator[str]:
    """The address of a server that has started."""
    command = [sys.executable, "-m", "v4jax_serve", path, "--port", "0", "--dtype", args.dtype]
    command += ["--max-seqs", str(args.clients), "--context", str(args.context)]
    command += ["--speculate", args.speculate] if args.speculate else []
    with log.open("w") as output:
        process = subprocess.Popen(command, stderr=output)
    try:
        while not (ready := re.search(r"is ready at (\S+)\n", log.read_text("utf-8"))):
            if process.poll() is not None:
                sys.exit(log.read_text("utf-8"))
            time.sleep(0.1)
        yield ready[1]
    finally:
        process.terminate()
        process.wait()


def over_http(url: str, model: str) -> Target:
    """A server's text completions; no prefix is known from an earlier run."""
    # The server may be about to listen.
    transport = httpx.AsyncHTTPTransport(retries=8, limits=httpx.Limits(max_connections=None))
    client = httpx.AsyncClient(base_url=url, transport=transport, timeout=None)
    settings = {"model": model, "temperature": 0, "user": f"{time.time_ns()}", "stream": True}
    settings |= {"return_token_ids": True, "stream_options": {"include_usage": True}}

    async def stream(prompt: list[int], count: int) -> AsyncGenerator[Piece]:
        body = settings | {"prompt": prompt, "max_tokens": count}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                sys.exit((await response.aread()).decode())
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    ids = [token for choice in chunk["choices"] for token in choice["token_ids"]]
                    yield ids, (chunk["usage"] or {}).get("prompt_cache_hit_tokens", 0)

    return stream


def on_engine(engine: Any, eos: tuple[int, ...]) -> Target:
    """The engine itself."""
    from v4jax.decoding.sampling import SamplingParams
    from v4jax.engine.request import Request

    async def stream(prompt: list[int], count: int) -> AsyncGenerator[Piece]:
        sampling = SamplingParams(temperature=0)
        request = Request(tokens=prompt, max_tokens=count, sampling=sampling, stop_tokens=eos)
        async with contextlib.aclosing(engine.generate(request)) as events:
            async for event in events:
                yield [token.id for token in event.tokens], event.usage.cached_tokens

    return stream


async def _measure_all(
    targets: dict[str, Target], every: list[Load], rounds: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    print(f"{'load':8}{'clients':>8} {'target':8}{'tokens/s':>9}{'cached':>8}", end="")
    print("".join(f"{text + ', p50 p90 p99 ms':>36}" for text in LATENCIES.values()))
    for number, load in enumerate(every):
        answers: dict[str, list[Answer]] = {name: [] for name in targets}
        seconds = dict.fromkeys(targets, 0.0)
        for lap, (name, target) in itertools.product(range(rounds), targets.items()):
            began, seed = time.perf_counter(), number * rounds + lap
            if load.is_open:
                answers[name] += await _open(target, load, seed, rates.get(name, 2.0) / 2)
            else:
                answers[name] += await _closed(target, load, seed)
            seconds[name] += time.perf_counter() - began
        for name in targets:
            if load.name == "plain":
                rates[name] = len(answers[name]) / seconds[name]
            row = {"rounds": rounds, "target": name} | _row(answers[name], seconds[name])
            rows.append(dataclasses.asdict(load) | row)
            _print(rows[-1])
    return rows


async def _closed(target: Target, load: Load, seed: int) -> list[Answer]:
    answers: list[Answer] = []
    waiting = iter(range(load.clients * load.conversations))

    async def client() -> None:
        for conversation in waiting:
            await _converse(target, load, [seed, conversation], answers)

    async with asyncio.TaskGroup() as group:
        for _ in range(load.clients):
            group.create_task(client())
    return answers


async def _open(target: Target, load: Load, seed: int, rate: float) -> list[Answer]:
    answers: list[Answer] = []
    gaps = np.random.default_rng(seed).exponential(1 / rate, load.clients * load.conversations)
    async with asyncio.TaskGroup() as group:
        for conversation, gap in enumerate(gaps):
            group.create_task(_converse(target, load, [seed, conversation], answers))
            await asyncio.sleep(gap)
    return answers


async def _converse(target: Target, load: Load, seed: list[int], answers: list[Answer]) -> None:
    prompt = np.random.default_rng(seed[0]).integers(*IDS, load.shared).tolist()
    rng = np.random.default_rng([*seed, 1])
    for _ in range(load.turns):
        prompt += rng.integers(*IDS, load.new).tolist()
        leaves = bool(load.leave) and seed[1] % load.leave == 0
        answer = await _ask(target, prompt, load.answer, leaves=leaves)
        answers.append(answer)
        prompt += answer.ids


async def _ask(target: Target, prompt: list[int], count: int, *, leaves: bool) -> Answer:
    """A request, timed; a client that leaves does so after half of the answer."""
    ids: list[int] = []
    cached, first, last = 0, 0.0, 0.0
    began = time.perf_counter()
    async with contextlib.aclosing(target(prompt, count)) as pieces:
        async for new, known in pieces:
            cached = max(cached, known)
            if new:
                last = time.perf_counter() - began
                first = first or last
                ids += new
            if leaves and len(ids) >= count // 2:
                break
    return Answer(ids, len(prompt), cached, first, last, leaves)


def _row(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Totals of all answers, and quantiles over those that were not left."""
    row: dict[str, Any] = {
        "requests": len(answers),
        "left": sum(answer.is_left for answer in answers),
        "tokens_per_second": sum(len(answer.ids) for answer in answers) / seconds,
        "cached": sum(a.cached for a in answers) / sum(a.prompt for a in answers),
    }
    for name in LATENCIES:
        values = [getattr(answer, name) for answer in answers if not answer.is_left]
        row[name] = np.percentile(values, QUANTILES).tolist()
    return row


def _print(row: dict[str, Any]) -> None:
    print(f"{row['name']:8}{row['clients']:8} {row['target']:8}", end="")
    print(f"{row['tokens_per_second']:9.1f}{row['cached']:8.0%}", end="")
    for name in LATENCIES:
        print(f"{' '.join(f'{1000 * value:.1f}' for value in row[name]):>36}", end="")
    print(flush=True)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw throughput by the number of clients, and latencies by load."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
    for name in {row["target"]: None for row in rows}:
        plain = [r for r in rows if r["target"] == name and r["name"] == "plain"]
        rates = [row["tokens_per_second"] for row in plain]
        axes[0].plot([row["clients"] for row in plain], rates, marker="o", label=name)
    axes[0].set(xlabel="clients", ylabel="tokens/s", ylim=(0, None), title="throughput")
    axes[0].legend()
    shown = [row for row in rows if row["target"] == "server"]
    labels = [f"{row['name']} {row['clients']}" for row in shown]
    for axis, (latency, title) in zip(axes[1:], LATENCIES.items(), strict=True):
        for i, quantile in enumerate(QUANTILES):
            values = [1000 * row[latency][i] for row in shown]
            axis.plot(values, labels, "o", label=f"p{quantile}")
        axis.set(xlabel="ms", xlim=(0, None), title=title)
        axis.invert_yaxis()
    axes[-1].legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
