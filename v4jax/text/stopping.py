"""Stop strings in streamed text: plain Python over characters, however the text is cut."""

from collections.abc import Sequence

from v4jax.arguments import Kind, checked, sequence

MOST_STOPS = 16


_LIST = sequence("a list of strings", of=str)
# As `generate` takes them: a string stands for a list of it.
STOP = Kind(
    f"a string or {_LIST.takes}",
    lambda value: _LIST.read([value] if isinstance(value, str) else value),
)


class StopStrings:
    """Finds the first of several strings to become complete, and lets through only text before it.

    The match that ends first counts; of several that end there, the longest. What comes out, put
    together, does not depend on how the text was cut into pieces.
    """

    @checked(stops=_LIST)
    def __init__(self, stops: Sequence[str]) -> None:
        """Take the strings; an empty sequence lets everything through.

        Raises:
          ValueError: not a sequence of strings, an empty string, or more than MOST_STOPS.
        """
        if len(stops) > MOST_STOPS:
            raise ValueError(
                f"There are {len(stops)} stop strings; at most {MOST_STOPS} are allowed."
            )
        if "" in stops:
            raise ValueError(
                "A stop string is empty, which would end every text at once; remove it."
            )
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
          Text that is certainly before any stop string, and whether one is complete. After that
          every push returns ("", True).
        """
        if self._stopped:
            return "", True
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._stopped, self._held = True, ""
            return text[: min(ends)[1]], True
        held_from = self._first_open(text)
        self._held = text[held_from:]
        return text[:held_from], False

    def flush(self) -> str:
        """The text held back, once no more is to come: nothing has become a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_open(self, text: str) -> int:
        """Where the longest end of the text begins that could still become a stop string."""
        longest = max(map(len, self._stops), default=1)
        starts = range(max(0, len(text) - longest + 1), len(text))
        is_open = lambda start: any(stop.startswith(text[start:]) for stop in self._stops)
        return next(filter(is_open, starts), len(text))
