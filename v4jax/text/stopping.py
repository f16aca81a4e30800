"""Stop strings in streamed text: plain Python over characters, however the text is split."""

from collections.abc import Sequence

from v4jax.arguments import Kind, checked, sequence

MAX_STOPS = 16

_LIST = sequence("a list of strings", of=str)
# The `stop` argument of `generate`: a string means a list of just that string.
STOP = Kind(
    f"a string or {_LIST.expected}",
    lambda value: _LIST.read([value] if isinstance(value, str) else value),
)


class StopStrings:
    """Finds the first stop string that becomes complete, and passes on only the text before it.

    `matched` is that string; None until then.

    The match that ends first counts; of several that end there, the longest. The concatenated
    output does not depend on how the text was split into pieces.
    """

    @checked(stops=_LIST)
    def __init__(self, stops: Sequence[str]) -> None:
        """Set the stop strings; with none, all text is passed on.

        Raises:
          ValueError: they are not a sequence of strings, one is empty, or there are more than
            MAX_STOPS.
        """
        if len(stops) > MAX_STOPS:
            raise ValueError(
                f"There are {len(stops)} stop strings; at most {MAX_STOPS} are allowed."
            )
        if "" in stops:
            raise ValueError(
                "A stop string is empty, which would end every text at once; remove it."
            )
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> tuple[str, bool]:
        """Process the next piece of text.

        Returns:
          Text that is certainly before any stop string, and whether one is complete. Once one is,
          every push returns ("", True).
        """
        if self.matched is not None:
            return "", True
        text = self._held + piece
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.matched = min(ends)
            self._held = ""
            return text[:at], True
        held_from = self._first_open(text)
        self._held = text[held_from:]
        return text[:held_from], False

    def flush(self) -> str:
        """The text held back; call it at the end of the text, if no stop string was found."""
        held, self._held = self._held, ""
        return held

    def _first_open(self, text: str) -> int:
        """Start of the longest suffix of the text that could still become a stop string."""
        longest = max(map(len, self._stops), default=1)
        starts = range(max(0, len(text) - longest + 1), len(text))
        is_open = lambda start: any(stop.startswith(text[start:]) for stop in self._stops)
        return next(filter(is_open, starts), len(text))
