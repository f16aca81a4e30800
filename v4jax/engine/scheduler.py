"""What to run next: which requests hold rows, whose prompt is read, who is decoded.

First come, first served within a priority. Each step reads at most one chunk of one prompt in each
group of rows and advances all rows that are past theirs, so a stream never waits for more than a
chunk. Integers, without JAX, clock or thread.
"""

import bisect
import dataclasses

from v4jax.engine.memory import Memory
from v4jax.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a prompt to read.

    Attributes:
      sequence: whose prompt.
      start: its first token, at a multiple of BLOCK.
      count: its number of tokens.
      narrow: whether it is the prompt's last block, complete or not.
    """

    sequence: Sequence
    start: int
    count: int
    narrow: bool

    @property
    def last(self) -> bool:
        """Whether it ends the prompt."""
        return self.start + self.count == self.sequence.prompt


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step of the engine.

    Attributes:
      admitted: sequences that now have a row.
      chunks: chunks to read, at most one a group, of one adapter and all narrow or none.
      rows: sequences to advance.
      steps: most steps to advance them by.
    """

    admitted: list[Sequence]
    chunks: list[Chunk]
    rows: list[Sequence]
    steps: int


class Scheduler:
    """The queues and the rows of an engine.

    Attributes:
      waiting: sequences without a row, in order.
      idle: those that only run while nothing else does.
      running: sequences with a row.
      preemptions: rows that made way for others.
    """

    def __init__(
        self, memory: Memory, *, rows: int, chunk: int, width: int, groups: int = 1
    ) -> None:
        """Set up empty rows.

        Args:
          memory: the pages.
          rows: number of slots.
          chunk: most tokens of a chunk, a multiple of BLOCK.
          width: tokens that a step runs for a row: the newest and its drafts.
          groups: groups of rows, of which each has as many slots.
        """
        self.waiting: list[Sequence] = []
        self.idle: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._memory, self._chunk, self._width = memory, chunk, width
        each = rows // groups
        self._free_rows = [[*reversed(range(g * each, (g + 1) * each))] for g in range(groups)]

    def add(self, sequence: Sequence) -> None:
        """Queue a new or preempted sequence."""
        sequence.state = "waiting"
        bisect.insort(self._queue(sequence), sequence, key=lambda s: s.rank)

    def end(self, sequence: Sequence) -> None:
        """Remove a sequence, and free its row and pages."""
        if sequence.state == "waiting":
            self._queue(sequence).remove(sequence)
        elif sequence.state != "ended":
            self._leave(sequence)
        sequence.state, sequence.saved = "ended", None

    def plan(self, steps: int) -> Plan:
        """The next step of the engine; rows are advanced by at most `steps` steps."""
        admitted = self._admit()
        chunks = self._next_chunks()
        steps = 1 if chunks else steps
        for sequence in sorted(self.running, key=lambda s: s.rank):
            if sequence.state == "decode":
                self._make_room(sequence)
        rows = [sequence for sequence in self.running if sequence.state == "decode"]
        if not all(self._memory.extend(row, self._room(row, steps)) for row in rows):
            steps = 1
        chunks = [chunk for chunk in chunks if chunk.sequence.row is not None]
        return Plan([s for s in admitted if s.row is not None], chunks, rows, steps)

    def finish_chunk(self, chunk: Chunk) -> None:
        """Record that a chunk has been computed."""
        sequence = chunk.sequence
        sequence.length = chunk.start + chunk.count
        if not chunk.narrow:
            self._memory.publish(sequence)
        if chunk.last:
            sequence.state = "decode"

    def _admit(self) -> list[Sequence]:
        """Give rows and pages to waiting sequences, in order, until one has to wait."""
        admitted: list[Sequence] = []
        while queue := self.waiting or (self.idle if not self.running else []):
            sequence = queue[0]
            if not self._place(sequence):
                break
            queue.remove(sequence)
            sequence.state = "decode" if sequence.length >= sequence.prompt else "prefill"
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _place(self, sequence: Sequence) -> bool:
        """Find a row and pages for a sequence; rows of lower priority make way.

        A prompt waits until those before it in a group have been read, and wherever they are those
        that begin alike: it may begin with what they publish.
        """
        reading = [s for s in self.running if s.state == "prefill" and s.rank < sequence.rank]
        if sequence.saved is not None:
            reading = []
        if any(s.keys[:1] == sequence.keys[:1] != [] for s in reading):
            return False
        taken = {s.group for s in reading}
        groups = [group for group in self._memory.groups(sequence) if group not in taken]
        while groups and not any(self._open(sequence, group) for group in groups):
            below = [s for s in self.running if s.request.priority > sequence.request.priority]
            if not below:
                return False
            self._preempt(max(below, key=lambda s: s.rank))
        return bool(groups)

    def _open(self, sequence: Sequence, group: int) -> bool:
        """Give a sequence a row of a group, and pages for a step after its prompt."""
        free, tokens = self._free_rows[group], self._room(sequence, 1)
        if not free or not self._memory.open(sequence, group, free[-1], tokens):
            return False
        sequence.row = free.pop()
        return True

    def _next_chunks(self) -> list[Chunk]:
        """The next chunk of each group, as far as one program reads them at once."""
        groups = range(len(self._free_rows))
        chunks = [chunk for group in groups if (chunk := self._next_chunk(group))]
        kind = lambda chunk: (chunk.narrow, chunk.sequence.request.adapter)
        first = min(chunks, key=lambda chunk: chunk.sequence.rank, default=None)
        return [chunk for chunk in chunks if first and kind(chunk) == kind(first)]

    def _next_chunk(self, group: int) -> Chunk | None:
        """The next chunk of a group's first sequence whose prompt has not been read."""
        reading = [s for s in self.running if s.state == "prefill" and s.group == group]
        if not reading:
            return None
        sequence = min(reading, key=lambda s: s.rank)
        start, end = sequence.length, sequence.reusable
        if sequence.is_idle and (len(self.running) > 1 or start >= end):
            return None
        if start >= end:
            return Chunk(sequence, start, sequence.prompt - start, narrow=True)
        stop = self._memory.next_snapshot(sequence)
        return Chunk(sequence, start, min(self._chunk, stop - start), narrow=False)

    def _room(self, sequence: Sequence, steps: int) -> int:
        """Tokens that a sequence has after its prompt and some steps, at most."""
        tokens = max(sequence.length, sequence.prompt) + steps * self._width
        return min(tokens, sequence.limit)

    def _make_room(self, sequence: Sequence) -> None:
        """Give a row pages for the tokens of a step; rows that come after it may have to leave."""
        tokens = self._room(sequence, 1)
        while sequence.state == "decode" and not self._memory.extend(sequence, tokens):
            rivals = [s for s in self.running if s.group == sequence.group]
            self._preempt(max(rivals, key=lambda s: s.rank))

    def _preempt(self, sequence: Sequence) -> None:
        """Move a row back to the queue: decoded tokens are saved, a prompt is read again."""
        self.preemptions += 1
        if sequence.state == "decode":
            self._memory.save(sequence)
        self._leave(sequence)
        self.add(sequence)

    def _queue(self, sequence: Sequence) -> list[Sequence]:
        return self.idle if sequence.is_idle else self.waiting

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._memory.release(sequence)
        if sequence.row is not None:
            self._free_rows[sequence.group].append(sequence.row)
        sequence.row = None
