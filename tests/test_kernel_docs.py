"""docs/kernels.md and its pictures are what the code makes of its records."""

import dataclasses
import json
import re
from xml.etree import ElementTree

import pytest

from benchmarks import draw_kernels, roofline
from benchmarks.kernel_cases import cases
from benchmarks.tpu_cycles import CHIPS, Part

PAGE = roofline.PAGE.read_text(encoding="utf-8")


def test_table_is_what_the_records_give() -> None:
    assert roofline.written(PAGE) == PAGE, "run `python -m benchmarks.roofline --write`"


def test_records_are_of_the_cases_at_hand() -> None:
    """One per case and chip, with the same bytes and flops."""
    lines = roofline.RECORDS.read_text(encoding="utf-8").splitlines()
    recorded = {(row["case"], row["chip"]): row["bound_us"] for row in map(json.loads, lines)}
    wanted = {}
    for case in cases():
        for chip, (_, bandwidth, peak) in CHIPS.items():
            bound = max(case.bytes / bandwidth, case.flops / peak)
            wanted[f"{case.op} {case.name}", chip] = round(bound * 1e6, 2)
    assert recorded == wanted
    assert len(lines) == len(wanted)


def test_pictures_are_what_the_script_draws() -> None:
    drawn = draw_kernels.pictures()
    there = {file.name: file.read_text("utf-8") for file in draw_kernels.FOLDER.glob("*.svg")}
    assert there == drawn, "run `python -m benchmarks.draw_kernels`"
    shown = re.findall(r"\(images/kernels/(\w+\.svg)\)", PAGE)
    assert sorted(shown) == sorted(drawn)
    for text in drawn.values():
        ElementTree.fromstring(text)


def test_runs_multiply_the_trips_of_loops_around_a_part() -> None:
    # A grid of 8 steps with a loop of 4 in it, which has a loop of 3 and a tail.
    parts = [
        Part(0, 5),
        Part(1, 20),
        Part(2, 30),
        Part(3, 40, trips=3),
        Part(2, 50, trips=4),
        Part(1, 60, trips=10),
        Part(0, 7),
    ]
    assert roofline.runs(parts) == [1, 8, 32, 96, 32, 8, 1]
    assert roofline.runs(parts, grid=False) == [1, 10, 40, 120, 40, 10, 1]
    unknown = [dataclasses.replace(part, trips=0) if part.depth == 3 else part for part in parts]
    with pytest.raises(ValueError, match="no trip count at depth 3"):
        roofline.runs(unknown)
