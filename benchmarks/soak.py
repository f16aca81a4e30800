"""Clients that misbehave, against a server that is watched: `python -m benchmarks.soak SECONDS`.

A server passes if it answers nothing with a 5xx but 503, ends every stream that a client reads, and
holds in the end what it held at the beginning.
"""

import asyncio
import collections
import contextlib
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import psutil

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
# path -> body of a request that is fine, and what ends its stream.
FINE: dict[str, tuple[dict[str, Any], str]] = {
    CHAT: ({"messages": HELLO, "max_tokens": 30}, "[DONE]"),
    "/v1/completions": ({"prompt": "Once", "max_tokens": 30}, "[DONE]"),
    "/v1/messages": ({"messages": HELLO, "max_tokens": 30}, "message_stop"),
    "/v1/responses": ({"input": "Hello", "max_output_tokens": 30}, "response."),
}
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_PATIENCE = 120  # seconds for a whole answer


def _schema(size: int) -> dict[str, Any]:
    properties = {f"name{i}": {"enum": [*map(str, range(20))]} for i in range(size)}
    return {"type": "json_schema", "json_schema": {"schema": {"properties": properties}}}


def _deep(depth: int) -> bytes:
    return b'{"model": "tiny", "messages": ' + b"[" * depth + b"]" * depth + b"}"


BODIES: list[Callable[[], bytes]] = [
    lambda: random.randbytes(random.randrange(3000)),
    lambda: b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    lambda: b'{"model": "\\ud800"}',
    lambda: _deep(random.choice((10, 100, 100_000))),
    lambda: _json(messages=HELLO, response_format=_schema(random.choice((50, 3000)))),
    lambda: _json(messages=HELLO, temperature=1e400),
    lambda: _json(messages=HELLO * 2000, max_tokens=1),
    lambda: _json(messages=HELLO, tools=[{}] * 1000),
    lambda: b"[" + b"1," * 500_000 + b"1]",
]


def _json(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny"} | fields).encode()


class Clients:
    """Clients of one server, and what they have seen.

    Attributes:
      seen: how often each behaviour ended with each status.
      wrong: descriptions of answers that no client should get.
      slowest: most seconds that a whole answer took.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.seen: collections.Counter[tuple[str, int]] = collections.Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0

    async def run(self, seconds: float, clients: int) -> None:
        """Let many clients behave at random for some time."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client(end) for _ in range(clients)))

    async def _client(self, end: float) -> None:
        behaviours: list[Callable[[], Awaitable[int]]] = [
            *(self._fine, self._fine, self._stream, self._leave, self._leave, self._malformed),
            *(self._half_a_body, self._garbage, self._oversize, self._slow_reader, self._idle),
        ]
        while time.monotonic() < end:
            behaviour = random.choice(behaviours)
            name = behaviour.__name__.strip("_")
            try:
                async with asyncio.timeout(_PATIENCE):
                    status = await behaviour()
            except TimeoutError:
                self.wrong.append(f"{name}: no end after {_PATIENCE} seconds")
                return
            except OSError:
                status = -1  # the server has closed the connection
            self.seen[name, status] += 1
            if status >= 500 and status != 503:
                self.wrong.append(f"{name}: {status}")
            await asyncio.sleep(random.random() * 0.2)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncGenerator[Streams]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def _asked(
        self, path: str, body: bytes, length: int | None = None
    ) -> AsyncGenerator[tuple[asyncio.StreamReader, int]]:
        """A reader of the answer, and its status; a different length may be announced."""
        async with self._connection() as (reader, writer):
            head = f"POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
            length = len(body) if length is None else length
            writer.write(f"{head}content-length: {length}\r\n\r\n".encode() + body)
            if length == len(body):
                yield reader, await _status(reader)
            else:
                yield reader, 0

    async def _fine(self) -> int:
        path, (fields, _) = random.choice([*FINE.items()])
        began = time.monotonic()
        async with self._asked(path, _json(**fields)) as (reader, status):
            text = await reader.read()
            if status == 200 and not text.rstrip().endswith((b"}", b"0")):
                self.wrong.append(f"fine: {text[-200:]}")
        self.slowest = max(self.slowest, time.monotonic() - began)
        return status

    async def _stream(self) -> int:
        path, (fields, end) = random.choice([*FINE.items()])
        async with self._asked(path, _json(stream=True, **fields)) as (reader, status):
            text = await reader.read()
            if status == 200 and end.encode() not in text[-9000:]:
                self.wrong.append(f"stream: {text[-200:]}")
        return status

    async def _leave(self) -> int:
        path, (fields, _) = random.choice([*FINE.items()])
        stream = random.random() < 0.7
        async with self._asked(path, _json(stream=stream, **fields)) as (reader, status):
            await reader.read(random.randrange(1, 2000))
        return status

    async def _malformed(self) -> int:
        path = random.choice([*FINE, "/tokenize", "/detokenize", "/v1/messages/count_tokens"])
        async with self._asked(path, random.choice(BODIES)()) as (reader, status):
            await reader.read()
        return status

    async def _half_a_body(self) -> int:
        body = _json(messages=HELLO)
        async with self._asked(CHAT, body, len(body) + 100):
            await asyncio.sleep(random.random())
        return 0

    async def _garbage(self) -> int:
        async with self._connection() as (reader, writer):
            writer.write(random.randbytes(200) + b"\r\n\r\n")
            return await _status(reader)

    async def _oversize(self) -> int:
        async with self._asked(CHAT, b" " * (33 * 2**20)) as (_, status):
            return status

    async def _slow_reader(self) -> int:
        path, (fields, _) = random.choice([*FINE.items()])
        async with self._asked(path, _json(stream=True, **fields)) as (reader, status):
            for _ in range(random.randrange(8)):
                await reader.read(1)
                await asyncio.sleep(1)
        return status

    async def _idle(self) -> int:
        async with self._connection():
            await asyncio.sleep(random.random() * 3)
        return 0


async def _status(reader: asyncio.StreamReader) -> int:
    line = await reader.readline()
    return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else -1


def metrics(port: int) -> dict[str, float]:
    """The server's metrics, without their labels; those of several labels are summed."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    values: dict[str, float] = collections.defaultdict(float)
    for line in lines:
        if not line.startswith("#"):
            values[re.split("[{ ]", line)[0]] += float(line.split()[-1])
    return values


@contextlib.contextmanager
def _server() -> Iterator[tuple[psutil.Process, int]]:
    """A server of the tiny model, and its port."""
    words = [sys.executable, "-m", "v4jax_serve", "tiny", "--port", "0", "--context", "2048"]
    process = subprocess.Popen([*words, "--queue", "64"], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        for line in process.stderr:
            if ready := re.search(r"ready at http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            sys.exit("The server has not started.")
        # A pipe that nobody reads would stop the server.
        subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield psutil.Process(process.pid), int(ready[1])
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    """Run the clients against a server; prints what it holds each tenth of the time."""
    seconds, clients = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with _server() as (process, port):
        crowd = Clients(port)
        for _ in range(10):
            asyncio.run(crowd.run(seconds / 10, clients))
            end = time.monotonic() + 60
            while (held := metrics(port))["vllm:num_requests_running"] and time.monotonic() < end:
                time.sleep(0.5)
            in_use = held["v4jax:pages_used"] - held["v4jax:pages_cached"]
            print(
                f"RSS {process.memory_info().rss / 2**20:.0f} MiB, {process.num_threads()} threads,"
                f" {len(process.net_connections())} sockets,"
                f" running {held['vllm:num_requests_running']:.0f}, pages in use {in_use:.0f},"
                f" recompilations {held['v4jax:recompilations_total']:.0f},"
                f" requests {sum(crowd.seen.values())}, slowest {crowd.slowest:.1f} s",
                flush=True,
            )
    for (name, status), count in sorted(crowd.seen.items()):
        print(f"{name:12} {status:4} {count:6}")
    print(f"{len(crowd.wrong)} wrong", *crowd.wrong[:10], sep="\n")
    return bool(crowd.wrong)


if __name__ == "__main__":
    sys.exit(main())
