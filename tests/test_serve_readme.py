"""A real server of the small model: the README's examples, and what only the engine can show."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests import quick
from tests.house import ROOT

README = (ROOT / "README.md").read_text("utf-8")
SECTION = README.partition("## Serve\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"
CONTEXT = 2048
# More than two blocks of the prefix cache.
LONG = "A list is a mutable sequence, and a tuple is an immutable one. " * 20
WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Lima", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]

pytestmark = pytest.mark.slow


class Server:
    """A process that serves: its address, and its log so far."""

    def __init__(self, log: Path) -> None:
        command = [sys.executable, "-m", "v4jax_serve", "tiny", "--port", "0"]
        command += ["--context", str(CONTEXT), "--max-seqs", "2", "--dtype", "float32"]
        environment = os.environ | quick.ENVIRONMENT
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stderr=output, env=environment)
        self.url = self.wait(r"is ready at (\S+)\n")
        with httpx.Client(transport=httpx.HTTPTransport(retries=10)) as client:
            assert client.get(f"{self.url}/ready").status_code == 200

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8")

    def wait(self, pattern: str) -> str:
        """Wait for a line of the log; returns the pattern's group."""
        deadline = time.monotonic() + 240
        while not (line := re.search(pattern, self.log)):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return line[1]

    def metric(self, name: str) -> float:
        """The value of a metric; 0 if nothing was counted."""
        text = httpx.get(f"{self.url}/metrics").text
        value = re.search(rf"^{re.escape(name)}.* (\S+)$", text, re.MULTILINE)
        return float(value[1]) if value else 0.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("serve") / "log")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="module")
def chat(server: Server) -> Iterator[Any]:
    """Creates greedy answers without thinking."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        def create(text: str | list[Any], **changes: Any) -> Any:
            messages: Any = [{"role": "user", "content": text}] if isinstance(text, str) else text
            settings = {"max_tokens": 32, "temperature": 0, "reasoning_effort": "none"} | changes
            return client.chat.completions.create(model="tiny", messages=messages, **settings)

        yield create


def test_the_readme_has_an_example_for_each_client() -> None:
    assert [kind for kind, _ in BLOCKS] == ["sh", "python", "python"]
    assert all(ADDRESS in block for _, block in BLOCKS)


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "sh"])
def test_commands_of_the_readme_run(server: Server, block: str) -> None:
    command = ["bash", "-c", block.replace(ADDRESS, server.url)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"])
def test_python_of_the_readme_runs(
    server: Server, capsys: pytest.CaptureFixture[str], block: str
) -> None:
    exec(compile(block.replace(ADDRESS, server.url), "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 40


def test_a_stream_has_the_text_of_a_whole_answer(chat: Any) -> None:
    whole = chat("What is a list?")
    chunks = list(chat("What is a list?", stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(text) > 20
    assert text == whole.choices[0].message.content
    assert len(chunks) > 4
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_log_probabilities_are_those_of_the_tokens(chat: Any) -> None:
    answer = chat("What is a tuple?", logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert text.startswith(answer.choices[0].message.content)
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0  # the answer is greedy
        assert entry.logprob >= entry.top_logprobs[1].logprob


def test_a_repeated_prefix_is_shown_in_usage(server: Server, chat: Any) -> None:
    before = server.metric("vllm:prefix_cache_hits_total")
    first, again, longer = (chat(LONG), chat(LONG), chat(f"{LONG}Which one is shorter?"))
    whole_blocks = (first.usage.prompt_tokens - 1) // 128 * 128
    assert whole_blocks >= 256
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == whole_blocks
    assert longer.usage.prompt_tokens_details.cached_tokens >= whole_blocks - 128
    assert again.choices[0].message.content == first.choices[0].message.content
    reused = sum(answer.usage.prompt_cache_hit_tokens for answer in (again, longer))
    assert server.metric("vllm:prefix_cache_hits_total") - before == reused


def test_a_call_can_be_required_and_its_result_sent_back(chat: Any) -> None:
    question = {"role": "user", "content": "What is the weather in Oslo?"}
    called = chat([question], tools=TOOLS, tool_choice="required", max_tokens=400)
    message = called.choices[0].message
    assert called.choices[0].finish_reason == "tool_calls"
    assert not message.content
    results = []
    for call in message.tool_calls:
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Lima", "Oslo")
        results.append({"role": "tool", "tool_call_id": call.id, "content": "Snow."})
    answered = chat([question, message.to_dict(), *results], tools=TOOLS)
    assert answered.usage.prompt_tokens > called.usage.prompt_tokens
    assert answered.usage.prompt_tokens_details.cached_tokens >= 128


def test_an_answer_follows_a_schema(chat: Any) -> None:
    properties = {"mutable": {"type": "boolean"}, "kind": {"enum": ["list", "tuple"]}}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    form = {"name": "kind", "schema": schema | {"additionalProperties": False}}
    response_format = {"type": "json_schema", "json_schema": form}
    # Greedily, this model would repeat a blank.
    settings = {"max_tokens": 200, "frequency_penalty": 2}
    answer = chat("Describe a list.", response_format=response_format, **settings)
    values = json.loads(answer.choices[0].message.content)
    assert values.keys() == properties.keys()
    assert values["mutable"] in (True, False)
    assert values["kind"] in ("list", "tuple")


def long_stream(server: Server, max_tokens: int) -> Any:
    """A stream that only its limit ends."""
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": CONTEXT}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Go on."}],
        "reasoning_effort": "none",
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
        "max_tokens": max_tokens,
        "stream": True,
    }
    return httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_a_client_that_leaves_ends_its_request(server: Server) -> None:
    name = 'vllm:request_success_total{finished_reason="abort"'
    aborted = server.metric(name)
    with long_stream(server, 1500) as stream:
        lines = stream.iter_lines()
        while '"content":"[' not in next(lines):
            pass
    deadline = time.monotonic() + 20
    while server.metric(name) == aborted or server.metric("vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.metric(name) == aborted + 1


def test_each_request_is_a_line_of_the_log_without_its_text(server: Server, chat: Any) -> None:
    chat("A secret.", user="somebody")
    line = json.loads(server.wait(r'\n(\{.*"user": .*\})\n'))
    assert (line["status"], line["finish"], line["model"]) == (200, "length", "tiny")
    assert line["completion_tokens"] == 32
    assert not re.search("secret|somebody|mutable", server.log)


def test_nothing_is_compiled_after_the_start(server: Server) -> None:
    assert server.metric("v4jax:steps_total") > 0
    assert server.metric("v4jax:recompilations_total") == 0


def test_a_signal_lets_streams_end(server: Server) -> None:
    """The last test of this file: it ends the server."""
    with long_stream(server, 100) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0
