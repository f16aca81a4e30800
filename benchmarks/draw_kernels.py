"""Draw docs/images/kernels: what each TPU kernel moves between HBM and VMEM.

    python -m benchmarks.draw_kernels

The contents come from `pictures.toml` in that folder. Boxes are in four columns: HBM, two of VMEM,
and HBM again. An arrow runs from a box to one further right or to a neighbour in its column. The
output depends on nothing else, so a test can compare it with the files.
"""

import tomllib
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent.parent / "docs" / "images" / "kernels"

_LEFT = (24, 300, 562, 838)  # of each column
_BOX, _GAP, _TOP = 214, 20, 104
_LINE, _PADDING = 16, 9
_WIDTH = _LEFT[-1] + _BOX + 24
_PANELS = (("HBM", 12, 250), ("VMEM", 288, 788), ("HBM", 826, 1064))
_FILL = {"array": "#dbe9f6", "block": "#dff0d8", "scratch": "#fdf3cf", "work": "#eeeeee"}
_LEGEND = (
    ("array", "array in HBM"),
    ("block", "block of a grid step, double-buffered"),
    ("scratch", "scratch"),
    ("work", "computation"),
)


class Box(NamedTuple):
    """A box: a name for arrows, a kind (key of `_FILL`), a heading and lines below it."""

    key: str
    kind: str
    title: str
    lines: tuple[str, ...]


class Place(NamedTuple):
    """The position and height of a box."""

    left: int
    top: int
    height: int


def pictures() -> dict[str, str]:
    """The text of each file by name."""
    with (FOLDER / "pictures.toml").open("rb") as file:
        return {f"{name}.svg": _svg(picture) for name, picture in tomllib.load(file).items()}


def _svg(picture: dict[str, Any]) -> str:
    columns = [
        [Box(key, kind, title, tuple(lines)) for key, kind, title, *lines in picture[column]]
        for column in ("hbm", "vmem", "work", "out")
    ]
    places = dict(_placed(columns))
    bottom = max(place.top + place.height for place in places.values()) + 16
    height = bottom + 58
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"'
        f' width="{_WIDTH}" height="{height}" role="img"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#1b1b1b">',
        f"<title>{escape(picture['title'])}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8"'
        ' markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#444444"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#ffffff" stroke="#bbbbbb"/>',
        _text(24, 28, picture["title"], size=16, bold=True),
        _text(24, 48, f"Grid: {picture['grid']}"),
        *(
            f'<rect x="{left}" y="62" width="{right - left}" height="{bottom - 62}" rx="6"'
            f' fill="#f7f7f7" stroke="#cccccc"/>{_text(left + 12, 84, name, size=14, bold=True)}'
            for name, left, right in _PANELS
        ),
        *(_arrow(arrow, places) for arrow in picture["arrows"]),
        *(_box(box, places[box.key]) for column in columns for box in column),
        *_legend(bottom + 18),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _placed(columns: list[list[Box]]) -> Iterator[tuple[str, Place]]:
    """Place of each box by its key; columns are centred vertically."""
    height = lambda box: 2 * _PADDING + _LINE * (1 + len(box.lines))
    total = lambda column: sum(height(box) + _GAP for box in column) - _GAP
    tallest = max(total(column) for column in columns)
    for left, column in zip(_LEFT, columns, strict=True):
        top = _TOP + (tallest - total(column)) // 2
        for box in column:
            yield box.key, Place(left, top, height(box))
            top += height(box) + _GAP


def _box(box: Box, place: Place) -> str:
    left, top, height = place
    lines = (
        _text(left + 10, top + _PADDING + 12 + _LINE * i, line, bold=i == 0)
        for i, line in enumerate((box.title, *box.lines))
    )
    frame = (
        f'<rect x="{left}" y="{top}" width="{_BOX}" height="{height}" rx="5"'
        f' fill="{_FILL[box.kind]}" stroke="#666666"/>'
    )
    return frame + "".join(lines)


def _arrow(arrow: str, places: dict[str, Place]) -> str:
    source, line, target = arrow.split()
    start, end = places[source], places[target]
    if start.left == end.left:
        middle, down = start.left + _BOX // 2, start.top < end.top
        path = (
            f"M{middle} {start.top + (start.height if down else 0)}"
            f"L{middle} {end.top + (0 if down else end.height)}"
        )
    else:
        x, y = start.left + _BOX, start.top + start.height // 2
        to_y, bend = end.top + end.height // 2, (end.left - x) // 2
        path = f"M{x} {y}C{x + bend} {y} {end.left - bend} {to_y} {end.left} {to_y}"
    dashed = ' stroke-dasharray="5 4"' if line == "~>" else ""
    return (
        f'<path d="{path}" fill="none" stroke="#444444" stroke-width="1.5"{dashed}'
        ' marker-end="url(#head)"/>'
    )


def _legend(top: int) -> Iterator[str]:
    left = 24
    for kind, words in _LEGEND:
        yield (
            f'<rect x="{left}" y="{top - 11}" width="14" height="14" rx="3"'
            f' fill="{_FILL[kind]}" stroke="#666666"/>{_text(left + 20, top, words)}'
        )
        left += 44 + 6 * len(words)
    yield _text(
        24, top + 22, "Solid arrows: every step. Dashed arrows: once, or on some steps only."
    )


def _text(x: int, y: int, words: str, *, size: int = 12, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}"{weight}>{escape(words)}</text>'


def main() -> int:
    """Write all pictures."""
    for name, text in pictures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
