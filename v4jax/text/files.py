"""Read text, JSON and TOML from files, and show untrusted text on a terminal."""

import codecs
import collections
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

_OTHER_ENCODINGS = {
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# C0 except tab and line feed, DEL, C1, bidirectional formatting characters, and halves of surrogate
# pairs.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def decode(data: bytes) -> str:
    """Decode UTF-8 text, without the byte order mark that some editors add.

    Raises:
      ValueError: it is not UTF-8.
    """
    for mark, encoding in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise ValueError(f"it is in {encoding}; save it in UTF-8")
    return data.decode("utf-8-sig")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read the text of a file; see `decode`."""
    return decode(Path(path).read_bytes())


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
      ValueError: it is not TOML.
      OSError: it cannot be read.
    """
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not TOML ({error}).") from None


def parse_json(text: str) -> dict[str, Any]:
    """Parse a JSON object; raises ValueError for anything else, or for a repeated key."""
    parsed = json.loads(text, object_pairs_hook=unique_keys)
    if not isinstance(parsed, dict):
        raise ValueError("it is not an object")
    return parsed


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs; raises ValueError for a repeated key."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        [(repeated, _)] = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated!r} occurs twice")
    return unique


def visible(text: str) -> str:
    r"""The text with control characters escaped, as in `\x1b`, so that a terminal obeys none."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
