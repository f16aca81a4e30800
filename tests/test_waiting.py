"""What a person sees who waits for a compilation or for files."""

import contextlib
import io
import time

import jax
import nbclient
import nbformat
import pytest

from v4jax import waiting

TRACED, COMPILED = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        """The texts written after the cursor, each of which replaces the one before."""
        writes = self.getvalue().split("\x1b7")[1:]
        assert all(write.endswith("\x1b[K\x1b8") for write in writes)
        return [write.removesuffix("\x1b[K\x1b8") for write in writes]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setattr(waiting, "_EVERY", 0.01)
    return Terminal()


def test_a_compilation_is_shown_with_its_elapsed_time(terminal: Terminal) -> None:
    with contextlib.redirect_stderr(terminal), waiting.compilation("Reading the prompt"):
        time.sleep(0.1)
        jax.monitoring.record_event_duration_secs(TRACED, 0.1)
        time.sleep(1.2)
        jax.monitoring.record_event_duration_secs(COMPILED, 1.0)
        time.sleep(0.1)
    texts = list(dict.fromkeys(terminal.shown()))
    reading = "Reading the prompt ... 0:00:00"
    assert texts == [reading, "Compiling ... 0:00:00", "Compiling ... 0:00:01", ""]
    assert terminal.shown()[-2:] == [reading, ""]


def _slow(x: jax.Array) -> jax.Array:
    for i in range(100):
        x = jax.numpy.sin(x) * i
    return x


def test_jax_reports_the_compilations_that_are_shown(terminal: Terminal) -> None:
    with contextlib.redirect_stderr(terminal), waiting.compilation():
        jax.jit(_slow)(1.0)
    assert "Compiling ... 0:00:00" in terminal.shown()


def test_nothing_is_shown_of_a_program_that_is_compiled_already(terminal: Terminal) -> None:
    with contextlib.redirect_stderr(terminal), waiting.compilation():
        time.sleep(0.05)
    assert set(terminal.shown()) <= {""}


def test_progress_shows_the_share_done_and_the_remaining_time(terminal: Terminal) -> None:
    with contextlib.redirect_stderr(terminal), waiting.progress() as report:
        report("Loading", 0, 400)
        time.sleep(1.0)
        report("Loading", 100, 400)
        time.sleep(0.1)
    assert "Loading 0%" in terminal.shown()
    assert "Loading 25%, 0:00:03 left" in terminal.shown()
    assert terminal.shown()[-1] == ""


def test_an_error_removes_the_line(terminal: Terminal) -> None:
    def load() -> None:
        with contextlib.redirect_stderr(terminal), waiting.progress() as report:
            report("Loading", 1, 2)
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        load()
    assert terminal.shown()[-1] == ""


def test_nothing_is_written_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_EVERY", 0.01)
    file = io.StringIO()
    with (
        contextlib.redirect_stderr(file),
        waiting.compilation("Reading the prompt"),
        waiting.progress() as report,
    ):
        report("Loading", 1, 2)
        time.sleep(0.1)
    assert file.getvalue() == ""


def test_a_notebook_shows_it_below_the_cell() -> None:
    code = (
        "import time\nfrom v4jax import waiting\nwith waiting.progress() as report:\n"
        "    report('Loading', 1, 2)\n    time.sleep(1.2)\n    print('done')"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    messages: list[str] = []

    class Client(nbclient.NotebookClient):
        def process_message(self, msg, *args, **settings):
            if msg["msg_type"] in ("display_data", "update_display_data"):
                messages.append(msg["content"]["data"]["text/plain"])
            return super().process_message(msg, *args, **settings)

    Client(notebook, timeout=120).execute()
    assert messages[0].startswith("Loading 50%, 0:00:0")
    assert messages[-1] == ""
