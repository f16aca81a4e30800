"""Stop strings: the output does not depend on how the text is split into pieces."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.text.stopping import MAX_STOPS, StopStrings

# Few letters, so that stop strings overlap, nest and nearly match; two are outside ASCII, one of
# them outside the Basic Multilingual Plane.
LETTERS = st.text(alphabet="ab\u00e9\U0001f600", max_size=24)
STOPS = st.lists(st.text(alphabet="ab\u00e9\U0001f600", min_size=1, max_size=5), max_size=4)


def stream(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """The full output, and whether a stop string ended it."""
    matcher = StopStrings(stops)
    out = ""
    for piece in pieces:
        safe, stopped = matcher.push(piece)
        out += safe
        if stopped:
            return out, True
    return out + matcher.flush(), False


def expected(stops: list[str], text: str) -> tuple[str, bool]:
    """Read letter by letter until some stop string is complete."""
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(deadline=None, max_examples=300)
@given(stops=STOPS, text=LETTERS, cuts=st.lists(st.integers(0, 24)))
def test_any_split_outputs_the_text_before_the_first_complete_stop(stops, text, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert stream(stops, pieces) == expected(stops, text)


@settings(deadline=None, max_examples=200)
@given(stops=STOPS, text=LETTERS)
def test_held_text_is_exactly_what_could_still_become_a_stop(stops, text):
    matcher, out = StopStrings(stops), ""
    for end, letter in enumerate(text, start=1):
        safe, stopped = matcher.push(letter)
        if stopped:
            return
        out += safe
        prefix = text[:end]
        suffixes = (prefix[start:] for start in range(end))
        held = next((x for x in suffixes if any(s.startswith(x) for s in stops)), "")
        assert out + held == prefix


@pytest.mark.parametrize(
    ("stops", "pieces", "out"),
    [
        (["<end>"], ["so <e", "nd", "> more"], "so "),
        (["<end>"], ["so <en", "ough"], "so <enough"),
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo"),
        (["aab"], ["aaab"], "a"),
        (["abcd", "bc"], ["abc", "d"], "a"),
        (["bc", "abc"], ["xabc"], "x"),
        (["b", "abc"], ["abc"], "a"),
        (["\u00e9\U0001f600"], ["caf\u00e9", "\U0001f600!"], "caf"),
        ([], ["any", "thing"], "anything"),
    ],
    ids=[
        "across pieces",
        "near miss",
        "newlines",
        "overlaps itself",
        "two overlap: first to end",
        "two end together: longest",
        "nested",
        "unicode",
        "none",
    ],
)
def test_text_ends_before_the_stop(stops, pieces, out):
    assert stream(stops, pieces)[0] == out


def test_nothing_is_output_after_a_stop():
    matcher = StopStrings(["x"])
    assert matcher.push("ax") == ("a", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_without_stops_nothing_is_held():
    assert StopStrings([]).push("text") == ("text", False)


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        (["a", ""], "empty"),
        (["a"] * (MAX_STOPS + 1), "17 stop strings; at most 16"),
        ("abc", "must be a list"),
    ],
)
def test_invalid_stops_are_rejected(stops, message):
    with pytest.raises(ValueError, match=message):
        StopStrings(stops)
