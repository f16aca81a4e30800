"""The index of prefixes: a state machine of sequences that share pages, and single rules."""

import dataclasses
import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from v4jax.engine.pages import OutOfPages, Pages
from v4jax.engine.prefix import Hit, Prefix
from v4jax.model.cache import BLOCK

# All that determines a block's entries: adapter, salt and the tokens up to its end.
Text = tuple[str | None, str, tuple[int, ...]]


def index(count=20, blocks_per_page=4, max_snapshots=100):
    pages = Pages(count)
    return pages, Prefix(pages, blocks_per_page, max_snapshots, "model")


def blocks(*tokens: int) -> list[int]:
    """A prompt of blocks, each of one token."""
    return [token for token in tokens for _ in range(BLOCK)]


@dataclasses.dataclass
class Sequence:
    """A sequence as the scheduler has it.

    Attributes:
      texts: what determines the entries of each of its blocks.
      keys: their keys.
      pages: pages that it owns, in order.
      computed: blocks whose entries are in its pages.
      published: blocks that were published or come from a hit.
    """

    texts: list[Text]
    keys: list[bytes]
    pages: list[int]
    computed: int
    published: int


class Machine(RuleBasedStateMachine):
    """Sequences that hit, compute, publish, decode and end, beside a dictionary of entries.

    A block is published if a page of the index has it. The index has a page if the page has one
    owner more than sequences.
    """

    @initialize(
        count=st.integers(8, 24), blocks_per_page=st.integers(1, 4), snapshots=st.integers(0, 9)
    )
    def create(self, count, blocks_per_page, snapshots):
        self.count, self.n, self.max_snapshots = count, blocks_per_page, snapshots
        self.pages, self.prefix = index(count, blocks_per_page, snapshots)
        self.sequences: list[Sequence] = []
        self.entries: dict[tuple[int, int], Text] = {}  # by page and position; published ones
        self.snapshots: list[Text] = []  # least recently used first

    def owners(self, page: int) -> int:
        return sum(page in sequence.pages for sequence in self.sequences)

    def indexed(self, page: int) -> bool:
        return self.pages.references(page) > self.owners(page)

    def is_published(self, text: Text) -> bool:
        places = [place for place, other in self.entries.items() if other == text]
        return any(self.indexed(page) for page, _ in places)

    def forget(self, page: int) -> None:
        for position in range(self.n):
            self.entries.pop((page, position), None)

    def take(self, count: int) -> list[int] | None:
        """Pages for a sequence, evicted if need be; None if there are not so many."""
        if self.pages.free + self.prefix.evictable() < count:
            return None
        self.evict(max(0, count - self.pages.free))
        pages = [self.pages.take() for _ in range(count)]
        for page in pages:
            self.forget(page)
        return pages

    def check_hit(self, texts: list[Text], hit: Hit, tokens: int) -> None:
        usable = texts[: (tokens - 1) // BLOCK]
        chain = [*itertools.takewhile(self.is_published, usable)]
        deepest = max((i + 1 for i, t in enumerate(chain) if t in self.snapshots), default=0)
        assert (hit.blocks, hit.branch) == (deepest, len(chain))
        assert len(hit.pages) == -(-deepest // self.n)
        stored = [self.entries[hit.pages[i // self.n], i % self.n] for i in range(deepest)]
        assert stored == texts[:deepest]
        assert hit.snapshot == (texts[deepest - 1] if deepest else None)
        if deepest:
            self.snapshots.remove(hit.snapshot)
            self.snapshots.append(hit.snapshot)

    @rule(
        tokens=st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=8),
        cut=st.sampled_from([0, 1, 127]),
        root=st.sampled_from([*[(None, "")] * 6, ("a", ""), (None, "a")]),
    )
    def begin(self, tokens, cut, root):
        adapter, salt = root
        if len(self.sequences) == 3:
            self.end(self.sequences[0])
        prompt = blocks(*tokens)[: len(tokens) * BLOCK - cut]
        whole = len(prompt) // BLOCK
        texts: list[Text] = [(adapter, salt, tuple(tokens[: i + 1])) for i in range(whole)]
        keys = self.prefix.keys(prompt, adapter, salt)
        assert keys == self.prefix.keys(prompt, adapter, salt, keys[: whole // 2])
        hit = self.prefix.match(keys, len(prompt))
        self.check_hit(texts, hit, len(prompt))
        full = hit.pages[: hit.blocks // self.n]
        for page in hit.pages:
            self.pages.share(page)
        # Owners, so that `owners` counts them while pages are evicted.
        sequence = Sequence(texts, keys, hit.pages, hit.blocks, hit.blocks)
        self.sequences.append(sequence)
        fresh = self.take(-(-len(tokens) // self.n) - len(full))
        if fresh is None:
            self.end(sequence)
            return
        for page in hit.pages[len(full) :]:
            for position in range(hit.blocks % self.n):
                self.entries[fresh[0], position] = self.entries[page, position]
            self.pages.drop(page)
        sequence.pages = full + fresh

    @precondition(lambda self: self.sequences)
    @rule(
        place=st.integers(0, 99),
        count=st.sampled_from([1, 2, 3, 9]),
        decode=st.sampled_from([False, False, False, True]),
        snapshot=st.booleans(),
    )
    def compute(self, place, count, decode, snapshot):
        sequence = self.sequences[place % len(self.sequences)]
        first = sequence.computed
        publish = not decode and sequence.published == first
        sequence.computed = min(first + count, len(sequence.keys))
        for i in range(first, sequence.computed):
            page, position = sequence.pages[i // self.n], i % self.n
            assert self.owners(page) == 1, "a shared page is written"
            # What decoding computes is not what prefill would compute.
            self.entries.pop((page, position), None)
            if publish:
                self.entries[page, position] = sequence.texts[i]
        if publish:
            sequence.published = sequence.computed
            self.prefix.publish(sequence.keys[: sequence.computed], sequence.pages)
            assert all(key in self.prefix for key in sequence.keys[: sequence.computed])
        if snapshot and sequence.computed:
            self.take_snapshot(sequence)

    def take_snapshot(self, sequence: Sequence) -> None:
        text, key = sequence.texts[sequence.computed - 1], sequence.keys[sequence.computed - 1]
        dropped = [text for _, text in self.prefix.add_snapshot(key, text)]
        before = [t for t in self.snapshots if t == text]
        self.snapshots = [t for t in self.snapshots if t != text] + [text]
        surplus = max(0, len(self.snapshots) - self.max_snapshots)
        assert dropped == before + self.snapshots[:surplus]
        self.snapshots = self.snapshots[surplus:]
        assert [*self.prefix.snapshots.values()] == self.snapshots

    @precondition(lambda self: self.sequences)
    @rule(place=st.integers(0, 99))
    def end_one(self, place):
        self.end(self.sequences[place % len(self.sequences)])

    def end(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        for page in sequence.pages:
            self.pages.drop(page)

    @rule(count=st.integers(0, 2))
    def evict(self, count):
        idle = [page for page in range(self.count) if self.indexed(page) and not self.owners(page)]
        assert self.prefix.evictable() == len(idle)
        evicted = self.prefix.evict(count)
        assert len(evicted) == min(count, len(idle))
        for page, keys in evicted:
            texts = [self.entries[page, position] for position in range(len(keys))]
            for (adapter, salt, tokens), key in zip(texts, keys, strict=True):
                assert self.prefix.keys(blocks(*tokens), adapter, salt)[-1] == key
            self.forget(page)

    @invariant()
    def no_page_is_leaked(self):
        if hasattr(self, "pages"):
            for page in range(self.count):
                assert self.pages.references(page) - self.owners(page) in (0, 1)
            used = [page for page in range(self.count) if self.pages.references(page)]
            assert self.pages.free == self.count - len(used)

    def teardown(self):
        if hasattr(self, "pages"):
            for sequence in [*self.sequences]:
                self.end(sequence)
            self.evict(self.count)
            assert self.pages.free == self.count


Machine.TestCase.settings = settings(
    deadline=None, derandomize=True, max_examples=200, stateful_step_count=40
)
TestSequencesSharePages = Machine.TestCase


def test_pages_end_and_refuse_wrong_owners():
    pages = Pages(2)
    taken = [pages.take(), pages.take()]
    assert sorted(taken) == [0, 1]
    with pytest.raises(OutOfPages, match="all 2 pages of group 0 are in use"):
        pages.take()
    pages.share(0)
    pages.drop(0)
    assert (pages.free, pages.references(0)) == (0, 1)
    pages.drop(0)
    assert (pages.free, pages.take()) == (1, 0)
    pages.drop(1)
    for wrong in (pages.share, pages.drop):
        with pytest.raises(AssertionError, match=r"page 1 is .*free"):
            wrong(1)


@pytest.mark.parametrize(("length", "hit"), [(1, 0), (127, 0), (128, 0), (129, 1), (256, 1)])
def test_a_hit_leaves_a_token_to_compute(length, hit):
    pages, prefix = index()
    keys = prefix.keys(range(300), None, "")
    assert len(keys) == 2
    prefix.publish(keys, [pages.take()])
    for key in keys:
        prefix.add_snapshot(key, key)
    assert prefix.match(prefix.keys(range(length), None, ""), length).blocks == hit


def test_keys_depend_on_every_token_and_on_model_adapter_and_salt():
    _, prefix = index()
    tokens = [*range(3 * BLOCK)]
    keys = prefix.keys(tokens, None, "")
    for changed in (0, 127, 128, 383):
        other = prefix.keys([*tokens[:changed], 9999, *tokens[changed + 1 :]], None, "")
        same = [a == b for a, b in zip(keys, other, strict=True)]
        assert same == [changed >= (i + 1) * BLOCK for i in range(3)]
    roots = [(None, ""), ("", ""), ("None", ""), ("a", "b"), ("ab", ""), ('a", "b', ""), ("", "a")]
    models = [prefix, Prefix(Pages(1), 1, 1, "another")]
    firsts = {model.keys(tokens, *root)[0] for model in models for root in roots}
    assert len(firsts) == len(models) * len(roots)


def test_a_known_branch_without_a_snapshot_is_reported():
    pages, prefix = index()
    shared = [1] * 6
    keys = prefix.keys(blocks(*shared, 2, 2), None, "")
    prefix.publish(keys, [pages.take(), pages.take()])
    prefix.add_snapshot(keys[1], "early")
    prompt = blocks(*shared, 3, 3)
    hit = prefix.match(prefix.keys(prompt, None, ""), len(prompt))
    assert (hit.blocks, hit.snapshot, hit.branch) == (2, "early", 6)
    prefix.add_snapshot(keys[5], "branch")
    hit = prefix.match(prefix.keys(prompt, None, ""), len(prompt))
    assert (hit.blocks, hit.snapshot, hit.branch) == (6, "branch", 6)


def published(pages, prefix, *tokens):
    """Publish a chain on pages that only the index owns; returns keys and pages."""
    keys = prefix.keys(blocks(*tokens), None, "")
    taken = [pages.take() for _ in range(0, len(keys), 4)]
    prefix.publish(keys, taken)
    for page in taken:
        pages.drop(page)
    return keys, taken


def test_the_least_recently_used_chain_is_evicted_from_its_end():
    pages, prefix = index()
    old, old_pages = published(pages, prefix, *[1] * 10)
    new, new_pages = published(pages, prefix, *[2] * 10)
    prefix.match(old, 10 * BLOCK)
    order = [page for page, _ in prefix.evict(6)]
    assert order == new_pages[::-1] + old_pages[::-1]
    assert not any(key in prefix for key in old + new)


def test_a_gap_ends_a_match_until_it_is_published_again():
    pages, prefix = index()
    keys, taken = published(pages, prefix, *[1] * 12)
    for key in keys:
        prefix.add_snapshot(key, key)
    for page in (taken[0], taken[2]):
        pages.share(page)
    assert prefix.evict(9) == [(taken[1], keys[4:8])]
    assert (keys[3] in prefix, keys[4] in prefix, keys[8] in prefix) == (True, False, True)
    hit = prefix.match(keys, 13 * BLOCK)
    assert (hit.blocks, hit.branch, hit.pages) == (4, 4, taken[:1])
    again = pages.take()
    prefix.publish(keys[:8], [taken[0], again])
    assert prefix.match(keys, 13 * BLOCK).pages == [taken[0], again, taken[2]]


def test_pages_whose_blocks_another_page_has_are_given_up():
    pages, prefix = index()
    short, (first,) = published(pages, prefix, 1, 2)
    branch, (other,) = published(pages, prefix, 1, 3)
    assert pages.free == 18
    # The short chain, copied to a page of its own and continued.
    long, (continued,) = published(pages, prefix, 1, 2, 4)
    assert pages.references(first) == 0
    assert all(key in prefix for key in short + branch + long)
    # The same once more: the first one is kept.
    _, (again,) = published(pages, prefix, 1, 2, 4)
    assert pages.references(again) == 0
    assert {page for page, _ in prefix.evict(9)} == {other, continued}
