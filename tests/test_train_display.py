"""What a run displays: a line that fits the terminal, the remaining time, curves."""

import os
import pty
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from v4jax_train import display, journal
from v4jax_train.__main__ import main

METRICS: dict[str, Any] = {
    "step": 123,
    "steps": 1000,
    "loss": 2.5,
    "mtp_loss": 3.5,
    "gradient_norm": 0.25,
    "rate": 1e-4,
    "tokens_per_second_per_device": 1234.0,
    "mfu": 0.4,
    "skipped": 0.0,
}


def test_a_line_that_is_long_enough_shows_all_metrics() -> None:
    text = display.fitted(display.parts(METRICS, 3725.4), [3.0, 2.5] * 50, 200)
    assert text.endswith(
        "step 123/1000, 1:02:05 left, loss 2.5000, mtp 3.5000, 1,234 tokens/s/device,"
        " gradient 0.25, rate 1.00e-04, MFU 40.0%"
    )
    bars, _, _ = text.partition(" ")
    assert len(bars) == 24


@pytest.mark.parametrize("columns", [1, 10, 20, 40, 79, 80, 81, 120])
def test_a_line_fits_and_no_part_of_it_is_cut(columns: int) -> None:
    parts = display.parts(METRICS, 99.0)
    text = display.fitted(parts, [3.0, 2.0] * 50, columns)
    assert len(text) < columns
    if columns >= 40:
        assert "step 123/1000, 0:01:39 left" in text
        assert set(text.split(" ", 1)[1].split(", ")) <= set(parts)
    if columns >= 80:
        assert "loss 2.5000" in text


def test_a_skipped_step_is_visible_on_a_narrow_terminal() -> None:
    text = display.fitted(display.parts(METRICS | {"skipped": 1.0}), [], 80)
    assert "NOT APPLIED" in text


def test_the_remaining_time_is_estimated_from_the_steps_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    remaining = display.Remaining()
    assert remaining.seconds({"step": 7, "steps": 12}) is None
    assert remaining.seconds({"step": 8, "steps": 12}) == 16.0
    assert remaining.seconds({"step": 12, "steps": 12}) == 0.0


@pytest.mark.parametrize(("columns", "shown"), [(60, 60), (150, 150), (0, 80)])
def test_the_line_fits_the_terminal_of_standard_error(
    columns: int, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    main_end, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    with os.fdopen(terminal, "w") as stderr, os.fdopen(main_end, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", stderr)
        with display.live() as show:
            show(METRICS)
        line = screen.read(1000).decode().replace("\r", "").removeprefix("\x1b[K").rstrip()
    assert "step 123/1000, loss 2.5000" in line
    assert len(line) < shown
    assert ("MFU" in line) == (shown == 150)


def journal_of(directory: Path, content: bytes) -> Path:
    directory.mkdir()
    (directory / journal.FILE).write_bytes(content)
    return directory


STEP = b'{"kind": "step", "step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no steps yet"),
        (b'{"kind": "evaluation", "step": 1, "loss": 2.0}\n', "has no steps yet"),
        (STEP + b"}{\n", f"{journal.FILE}:2: is not a line of metrics; remove it."),
        (STEP + b"\n\xff\xfe\x00\n", f"{journal.FILE}:3: is not a line of metrics"),
        (b"[1, 2]\n" + STEP, f"{journal.FILE}:1: is not a line of metrics"),
        (b'{"step": 3}\n', f"{journal.FILE}:1: is not a line of metrics"),
        (b'{"kind": "step", "step": "3"}\n', f"{journal.FILE}:1: is not a line of metrics"),
        (b"17\n", f"{journal.FILE}:1: is not a line of metrics"),
    ],
)
def test_metrics_that_cannot_be_plotted_are_named(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = journal_of(tmp_path / "run", content)
    assert main(["plot", str(run)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert [file.name for file in run.iterdir()] == [journal.FILE]


def test_missing_and_non_numeric_metrics_are_not_plotted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = b'{"kind": "step", "step": 2, "loss": "low", "rate": null, "gradient_norm": [1]}\n'
    run = journal_of(tmp_path / "run", STEP + odd)
    assert main(["plot", str(run)]) == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    bare = journal_of(tmp_path / "bare", b'{"kind": "step", "step": 2}\n')
    assert main(["plot", str(bare), "--png", str(tmp_path / "bare.png")]) == 0
    assert capsys.readouterr().err == ""


def test_an_image_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = journal_of(tmp_path / "run", STEP)
    assert main(["plot", str(run), "--png", str(tmp_path / "no" / "a.png")]) == 1
    assert str(tmp_path / "no" / "a.png") in capsys.readouterr().err
