"""A device for the engine whose cache says which tokens each entry was computed from.

An entry is a hash of the adapter, the salt and all tokens up to its own; it is negative where a
step has computed it, and positive where prefill has. A row that reads anything else than the
entries of its tokens is an AssertionError. `answer_of` tells what it has to answer.
"""

import array
import collections
import dataclasses
import functools
import itertools
import math
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np

from v4jax.decoding.sampling import SamplingParams
from v4jax.engine.pages import Pages
from v4jax.engine.programs import STEPS
from v4jax.engine.request import Event, Request
from v4jax.engine.scheduler import Chunk, Scheduler
from v4jax.engine.sequence import Sequence
from v4jax.model.cache import BLOCK, SPARE

VOCAB, TOP = 64, 2
# A request of this salt has logits that are not finite after some of its tokens.
FAULTS = "faults"


def entries_of(request: Request, tokens: list[int]) -> list[int]:
    """Entries of a prompt, and of the tokens that follow it."""
    entries = _prompt_entries(tuple(request.tokens), request.adapter, request.salt)
    answer = itertools.accumulate(tokens[len(entries) :], _follow, initial=entries[-1])
    return entries + [-entry for entry in answer][1:]


def draw(entry: int, mask_W: np.ndarray | None = None) -> int:
    """The token after an entry."""
    if mask_W is None:
        return abs(entry) % VOCAB
    allowed = [token for token in range(VOCAB) if mask_W[token // 32] >> (token % 32) & 1]
    return allowed[abs(entry) % len(allowed)]


def logprob(entry: int, token: int) -> float:
    """The log-probability of a token after an entry."""
    return -(_follow(abs(entry), token) % 1024) / 64


def is_fault(request: Request, entry: int) -> bool:
    """Whether the logits after an entry are not finite."""
    return request.salt == FAULTS and entry % 50 == 0


class Pair:
    """Ends the text after two equal tokens."""

    last: int | None = None

    def push(self, token: int) -> bool:
        self.last, before = token, self.last
        return token == before


class Wakes:
    """After a multiple of 8, three tokens have to be odd ones below 16."""

    rest = 0

    def mask(self) -> np.ndarray | None:
        return np.array([0xAAAA, 0], np.uint32) if self.rest else None

    def push(self, token: int) -> None:
        assert not self.rest or (token < 16 and token % 2)
        self.rest = 3 if token % 8 == 0 else max(0, self.rest - 1)


class Breaks(Wakes):
    """Raises an error after its 20th token."""

    count = 0

    def mask(self) -> np.ndarray | None:
        return super().mask() if self.count < 20 else self.fail()

    def push(self, token: int) -> None:
        super().push(token)
        self.count += 1

    def fail(self) -> None:
        raise RuntimeError("broken")


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stops": {"stop_tokens": (3, 4)},
    "watched": {"watcher": Pair},
    "held": {"constraint": Wakes},
    "broken": {"constraint": Breaks},
    "penalised": {"sampling": SamplingParams(presence_penalty=1)},
    "penalised and held": {
        "sampling": SamplingParams(repetition_penalty=2),
        "constraint": Wakes,
        "stop_tokens": (7,),
    },
    "scored and penalised": {
        "prompt_logprobs": True,
        "top_logprobs": 1,
        "sampling": SamplingParams(frequency_penalty=-1),
    },
    "routed": {"routed_experts": True},
    "routed and held": {"routed_experts": True, "constraint": Wakes},
}


def answer_of(request: Request) -> tuple[list[int], str]:
    """The tokens of a request that runs alone, and why it ends."""
    answer: list[int] = []
    watcher = request.watcher and request.watcher()
    constraint = request.constraint and request.constraint()
    try:
        for _ in range(request.max_tokens):
            entry = entries_of(request, [*request.tokens, *answer])[-1]
            if is_fault(request, entry):
                return answer, "error"
            answer.append(draw(entry, constraint.mask() if constraint else None))
            if answer[-1] in request.stop_tokens or (watcher and watcher.push(answer[-1])):
                return answer, "stop"
            if constraint:
                constraint.push(answer[-1])
    except RuntimeError:
        return answer, "error"
    return answer, "length"


def routed(event: Event) -> list[int]:
    """The expert of each token that was read: see `Device`."""
    return [] if event.expert_TLA is None else event.expert_TLA[:, 0, 0].tolist()


@functools.cache
def _prompt_entries(tokens: tuple[int, ...], adapter: str | None, salt: str) -> list[int]:
    root = zlib.crc32(repr((adapter, salt)).encode())
    return [*itertools.accumulate(tokens, _follow, initial=root)][1:]


def _follow(entry: int, token: int) -> int:
    return hash((entry, token)) % (2**62 - 1) + 1


@dataclasses.dataclass
class _Row:
    """A row in a call: its tokens, the drafts that follow them, and how many tokens may follow."""

    sequence: Sequence
    tokens: list[int]
    drafts: list[int]
    left: int


class Device:
    """What `core` and `memory` call, with lists of entries for pages and rings.

    The one expert chosen for a token is the token.

    Attributes:
      scheduler: who shares pages; to be set.
      calls: rows advanced and chunks read so far.
      drafted, right: drafts that were verified and those that were right, of each sequence.
    """

    scheduler: Scheduler

    def __init__(self, rows: int, pages: Pages, page: int, width: int, accuracy: int) -> None:
        """Create empty pages of `page` tokens; of four drafts, about `accuracy` are right."""
        self._rows_each, self._pages_each = rows // pages.groups, pages.count // pages.groups
        self.width, self._accuracy, self._page, self._pages = width, accuracy, page, pages
        self.entries = [[0] * page for _ in range(pages.count)]
        self._rings: list[list[int]] = [[] for _ in range(rows)]
        self._counted: list[list[int]] = [[] for _ in range(rows)]
        self.chunks: list[Chunk] = []
        self.calls = 0
        self.drafted = collections.Counter[Sequence]()
        self.right = collections.Counter[Sequence]()

    def read_chunks(self, chunks: list[Chunk], masks: dict[int, np.ndarray]) -> Any:
        assert len({(c.narrow, c.sequence.request.adapter) for c in chunks}) == 1
        assert len({c.sequence.group for c in chunks}) == len(chunks)
        self.chunks += chunks
        groups, width = self._pages.groups, max(chunk.count for chunk in chunks)
        sampled, draft_Gk = _outputs(groups, 1), np.zeros((groups, self.width - 1), np.int32)
        id_GT, logprob_GT = np.zeros((groups, width), int), np.zeros((groups, width))
        expert_GTLA = np.zeros((groups, width, 1, 1), np.int16)
        for chunk in chunks:
            sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
            group = sequence.group
            assert sequence.length == start
            entries = self._read(sequence)
            self._write(sequence, start, entries[start:end])
            if chunk.last and sequence.left:
                row = _Row(sequence, [*sequence.tokens], [], sequence.left)
                _sample(row, entries[-1], masks.get(group), (sampled, group, 0))
                draft_Gk[group] = self._drafts(row)
                self._counted[_slot(sequence)] = row.tokens
            next_T = [*sequence.tokens[start + 1 : end + 1], 0][: chunk.count]
            expert_GTLA[group, : chunk.count, 0, 0] = sequence.tokens[start:end]
            id_GT[group, : chunk.count] = next_T
            pairs = zip(entries[start:end], next_T, strict=True)
            logprob_GT[group, : chunk.count] = [logprob(*pair) for pair in pairs]
        tops = {"top_id_GTN": id_GT[..., None], "top_logprob_GTN": logprob_GT[..., None]}
        scores = SimpleNamespace(logprob_GT=logprob_GT, **tops)
        is_scored = any(chunk.sequence.request.prompt_logprobs for chunk in chunks)
        return sampled, draft_Gk, scores if is_scored else None, expert_GTLA

    def advance(self, sequences: list[Sequence], masks: dict[int, Any], steps: int) -> Any:
        assert len({sequence.request.adapter for sequence in sequences}) == 1
        self.calls += 1
        count = len(self._rings)
        sampled, drafting = _outputs(count, STEPS * self.width), _drafting(count, self.width - 1)
        rows: dict[int, _Row] = {}
        for sequence in sequences:
            self._read(sequence)
            slot = _slot(sequence)
            assert sequence.left > 0
            drafts = [] if slot in masks else sequence.drafts
            rows[slot] = _Row(sequence, [*sequence.tokens], drafts, sequence.left)
        n = 0
        while n < min(steps, STEPS) and all(row.left > 0 for row in rows.values()):
            for slot, row in rows.items():
                self._step(row, masks.get(slot), (sampled, slot, n * self.width))
                row.drafts = [] if slot in masks else self._drafts(row)
            n += 1
        for slot, row in rows.items():
            self._counted[slot] = row.tokens
            if row.drafts:
                drafting.draft_Bk[slot], drafting.count_B[slot] = row.drafts, len(row.drafts)
            drafting.drafted_B[slot] = (
                self.drafted[row.sequence] - row.sequence.usage.drafted_tokens
            )
            drafting.right_B[slot] = self.right[row.sequence] - row.sequence.usage.accepted_tokens
        return sampled, drafting, n, sampled.expert_BTLA

    def fetch(self, outputs: Any) -> Any:
        return outputs

    def set_counts(self, sequence: Sequence) -> None:
        self._counted[_slot(sequence)] = [*sequence.tokens]

    def copy_page(self, source: int, target: int) -> None:
        self.entries[target] = [*self.entries[source]]

    def read_page(self, page: int, blocks: int) -> list[bytes]:
        return [self.pack(self.block(page, i)) for i in range(blocks)]

    def block(self, page: int, position: int) -> list[int]:
        """The entries of a block."""
        return self.entries[page][position * BLOCK : (position + 1) * BLOCK]

    def write_block(self, page: int, position: int, block: bytes) -> None:
        self.entries[page][position * BLOCK : (position + 1) * BLOCK] = self.unpack(block)

    def snapshot(self, row: int, length: int) -> list[int]:
        assert len(self._rings[row]) == length
        return [*self._rings[row]]

    def restore(self, row: int, length: int, snapshot: list[int]) -> None:
        assert len(snapshot) == length
        self._rings[row] = [*snapshot]

    def pack(self, snapshot: list[int]) -> bytes:
        return array.array("q", snapshot).tobytes()

    def unpack(self, content: bytes) -> list[int]:
        return array.array("q", content).tolist()

    def save(self, sequence: Sequence) -> Any:
        pages = [[*self.entries[page]] for page in sequence.pages]
        return self._rings[_slot(sequence)][: sequence.length], pages

    def resume(self, row: int, sequence: Sequence) -> None:
        self._rings[row], pages = sequence.saved
        for page, entries in zip(sequence.pages, pages, strict=False):
            assert self._pages.references(page) == 1
            self.entries[page] = entries

    def _read(self, sequence: Sequence) -> list[int]:
        """The entries of a row's tokens, once its pages and rings have been compared with them."""
        for page in range(self._pages.count):
            if not self._pages.references(page) and page % self._pages_each:
                self.entries[page] = [0] * self._page
        row, length = _slot(sequence), sequence.length
        places = {row // self._rows_each, *map(self._pages.group, sequence.pages)}
        assert places == {sequence.group}
        expected = entries_of(sequence.request, sequence.tokens)
        pages = itertools.chain(*(self.entries[page] for page in sequence.pages))
        assert [*itertools.islice(pages, length)] == expected[:length]
        if length:
            assert self._rings[row][:length] == expected[:length]
            assert len(self._rings[row]) - length <= (SPARE if sequence.sampled else 0)
        if sequence.penalised:
            assert self._counted[row] == sequence.tokens
        return expected

    def _write(self, sequence: Sequence, start: int, entries: list[int]) -> None:
        """Write entries to pages that no other row has, or to scratch, and to the rings."""
        for position, entry in enumerate(entries, start):
            index = position // self._page
            scratch = sequence.group * self._pages_each
            page = sequence.pages[index] if index < len(sequence.pages) else scratch
            self.entries[page][position % self._page] = entry
        others = [s.pages for s in self.scheduler.running if s is not sequence]
        assert not {*sequence.pages[start // self._page :]} & {*itertools.chain(*others)}
        ring = self._rings[_slot(sequence)]
        self._rings[_slot(sequence)] = ring[:start] + entries

    def _step(self, row: _Row, mask_W: np.ndarray | None, place: tuple[Any, int, int]) -> None:
        """Run a row's newest token and its drafts, and sample while they are right."""
        sequence, start = row.sequence, len(row.tokens) - 1
        entries = entries_of(sequence.request, row.tokens + row.drafts)[start:]
        self._write(sequence, start, entries)
        sampled, slot, at = place
        for i, entry in enumerate(entries):
            _sample(row, entry, mask_W, (sampled, slot, at + i))
            if row.left <= 0 or row.tokens[-1:] != row.drafts[i : i + 1]:
                break
        length = len(row.tokens) - 1
        assert length <= len(sequence.pages) * self._page, "entries are lost in scratch"
        if row.drafts:
            self.drafted[sequence] += len(row.drafts)
            self.right[sequence] += length - start - 1

    def _drafts(self, row: _Row) -> list[int]:
        """Drafts after a row's tokens, of which some are right."""
        drafts: list[int] = []
        for _ in range(self.width - 1):
            entry = abs(entries_of(row.sequence.request, row.tokens + drafts)[-1])
            is_wrong = entry // VOCAB % 4 >= self._accuracy
            drafts.append((draw(entry) + is_wrong) % VOCAB)
        return drafts


def _slot(sequence: Sequence) -> int:
    assert sequence.row is not None, "a sequence without a row runs"
    return sequence.row


def _outputs(rows: int, tokens: int) -> Any:
    """The tokens of a call, none of them real."""
    zeros = lambda dtype, *more: np.zeros((rows, tokens, *more), dtype)
    return SimpleNamespace(
        real_BT=zeros(bool),
        token_BT=zeros(np.int32),
        logprob_BT=zeros(np.float32),
        top_id_BTN=zeros(np.int32, TOP),
        top_logprob_BTN=zeros(np.float32, TOP),
        expert_BTLA=zeros(np.int16, 1, 1),
    )


def _drafting(rows: int, drafts: int) -> Any:
    zeros = lambda *more: np.zeros((rows, *more), np.int32)
    names = ("count_B", "share_B", "rest_B", "drafted_B", "right_B")
    return SimpleNamespace(draft_Bk=zeros(drafts), **{name: zeros() for name in names})


def _sample(row: _Row, entry: int, mask_W: np.ndarray | None, place: tuple[Any, int, int]) -> None:
    """Sample the token after an entry, report it at a place of a call's outputs, and add it."""
    sampled, b, t = place
    token, request = draw(entry, mask_W), row.sequence.request
    failed = is_fault(request, entry)
    sampled.real_BT[b, t], sampled.token_BT[b, t] = True, token
    sampled.logprob_BT[b, t] = math.nan if failed else logprob(entry, token)
    sampled.top_id_BTN[b, t] = token
    sampled.expert_BTLA[b, t] = row.tokens[-1]
    row.tokens.append(token)
    row.left = 0 if failed or token in request.stop_tokens else row.left - 1
