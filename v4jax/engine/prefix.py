"""The index of cached prefixes in device memory: which pages and snapshots a prompt may reuse.

A chain is the blocks of a prompt in order. The key of a block is a hash of all tokens up to the
block's end, so equal keys mean equal prefixes. Block i of a chain lies at position
i % blocks_per_page of a page, after the blocks of the same chain that belong before it.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from v4jax.engine.pages import Pages
from v4jax.model.cache import BLOCK


@dataclasses.dataclass(frozen=True)
class Hit:
    """The longest prefix of a prompt that is not computed again.

    Attributes:
      blocks: its length.
      pages: pages that hold it, in order. They must be shared before anything else is published or
        evicted; the last one, unless full of blocks of this prefix, must be copied to be continued.
      snapshot: state of a row at its end; None if `blocks` is 0.
      branch: blocks from the start of the prompt that are published. If they are more than
        `blocks`, a snapshot taken there makes them a hit of the next prompt that begins so.
    """

    blocks: int
    pages: list[int]
    snapshot: Any
    branch: int


class Prefix:
    """Published blocks and snapshots.

    It owns a page while it has blocks there that no other page of the index has. The entries of
    published blocks may not change, even if a sequence owns the page as well.

    Attributes:
      blocks_per_page: blocks that a page holds.
      max_snapshots: number of snapshots beyond which the least recently used are dropped.
      snapshots: state of a row at the end of a block, by the block's key; least recently used
        first. To be changed by the index's methods only.
    """

    def __init__(
        self, pages: Pages, blocks_per_page: int, max_snapshots: int, fingerprint: str
    ) -> None:
        """Create an empty index.

        Args:
          pages: the pages, shared with the sequences.
          blocks_per_page: blocks that a page holds.
          max_snapshots: number of snapshots beyond which the least recently used are dropped.
          fingerprint: of the model, and of all settings that its entries depend on.
        """
        self.snapshots: dict[bytes, Any] = {}
        self._pages, self.blocks_per_page = pages, blocks_per_page
        self.max_snapshots, self._fingerprint = max_snapshots, fingerprint
        # Blocks of each page, in order; least recently used page first.
        self._blocks: dict[int, list[bytes]] = {}
        # Pages that have a block, at least one. A copy of a page's first blocks, continued with
        # others, makes several.
        self._holders: dict[bytes, list[int]] = {}

    def __contains__(self, key: bytes) -> bool:
        """Whether a block is published; those before it may have been evicted."""
        return key in self._holders

    def page_of(self, key: bytes) -> int | None:
        """A page that has a block and those of its chain before it on the page."""
        return next(iter(self._holders.get(key, ())), None)

    def evictable(self, group: int | None = None) -> int:
        """Number of pages that only the index owns, of all groups or of one."""
        # A copy, as statistics are read on other threads.
        return len([*self._idle([*self._blocks], group)])

    def keys(
        self, tokens: Sequence[int], adapter: str | None, salt: str, known: Sequence[bytes] = ()
    ) -> list[bytes]:
        """Keys of all complete blocks of a text.

        Args:
          tokens: the text from its start.
          adapter: what identifies the adapter's weights; None for the base model.
          salt: prefixes are shared only between texts of the same salt.
          known: keys of its first blocks, from an earlier call.
        """
        keys = [*known]
        root = json.dumps([self._fingerprint, adapter, salt]).encode()
        key = keys[-1] if keys else hashlib.blake2b(root, digest_size=32).digest()
        ids = np.asarray(tokens[len(keys) * BLOCK : len(tokens) // BLOCK * BLOCK], "<i4")
        for block in ids.reshape(-1, BLOCK):
            key = hashlib.blake2b(key + block.tobytes(), digest_size=32).digest()
            keys.append(key)
        return keys

    def match(self, keys: Sequence[bytes], length: int) -> Hit:
        """The prefix that a prompt may reuse, which becomes the most recently used.

        Args:
          keys: keys of the prompt's blocks.
          length: tokens of the prompt; at least one of them is left to be computed.
        """
        blocks = branch = 0
        for key in keys[: (length - 1) // BLOCK]:
            if key not in self._holders:
                break
            branch += 1
            if key in self.snapshots:
                blocks = branch
        self._touch(keys[:branch])
        if not blocks:
            return Hit(0, [], None, branch)
        key = keys[blocks - 1]
        snapshot = self.snapshots[key] = self.snapshots.pop(key)
        pages = [self._holders[last][0] for last in self._last_keys(keys[:blocks])]
        return Hit(blocks, pages, snapshot, branch)

    def publish(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Publish the first blocks of a chain.

        The index shares the pages that have a block which it lacks, and gives up those whose blocks
        are all in another one.

        Args:
          keys: keys of the blocks, all of which prefill has computed.
          pages: pages that hold them, in order, copies and shared ones included; may be more.
        """
        n = self.blocks_per_page
        for index, start in enumerate(range(0, len(keys), n)):
            blocks = [*keys[start : start + n]]
            if blocks[-1] not in self._holders:
                self._add(pages[index], blocks)
        self._touch(keys)

    def add_snapshot(self, key: bytes, snapshot: Any) -> list[tuple[bytes, Any]]:
        """Add the state of a row at the end of a block.

        Returns:
          Snapshots that were dropped, with their keys: an earlier one of the same block, and the
          least recently used ones of too many.
        """
        dropped = [(key, self.snapshots.pop(key))] if key in self.snapshots else []
        self.snapshots[key] = snapshot
        surplus = max(0, len(self.snapshots) - self.max_snapshots)
        oldest = [*itertools.islice(self.snapshots, surplus)]
        return dropped + [(key, self.snapshots.pop(key)) for key in oldest]

    def evict(self, count: int, group: int | None = None) -> list[tuple[int, list[bytes]]]:
        """Give up the least recently used pages that no sequence owns, the ends of chains first.

        Args:
          count: how many.
          group: the group that has them; None: any.

        Returns:
          At most `count` pages, now free, with the keys of the blocks at their positions 0, 1, ...
          Their entries can be read until the pages are taken and written.
        """
        pages = [*itertools.islice(self._idle(self._blocks, group), count)]
        return [(page, self._remove(page)) for page in pages]

    def _idle(self, pages: Iterable[int], group: int | None) -> Iterator[int]:
        """Those of some pages that only the index owns, and that a group has."""
        for page in pages:
            is_there = group is None or self._pages.group(page) == group
            if is_there and self._pages.references(page) == 1:
                yield page

    def _last_keys(self, keys: Sequence[bytes]) -> list[bytes]:
        """The key of the last block on each page of a chain: who has it, has all before it."""
        n = self.blocks_per_page
        return [keys[min(start + n, len(keys)) - 1] for start in range(0, len(keys), n)]

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Mark the pages of a chain as recently used, the first one last: it is evicted last."""
        for key in reversed(self._last_keys(keys)):
            page = self._holders[key][0]
            self._blocks[page] = self._blocks.pop(page)

    def _add(self, page: int, blocks: list[bytes]) -> None:
        """Add a page, or blocks to a page, and remove the page that has the first of them only."""
        known = self._blocks.get(page, [])
        assert known == blocks[: len(known)], f"page {page} has blocks of another chain"
        if not known:
            self._pages.share(page)
        self._blocks[page] = blocks
        for key in blocks[len(known) :]:
            self._holders.setdefault(key, []).append(page)
        holders = {holder: key for key in blocks[:-1] for holder in self._holders[key]}
        for holder, key in holders.items():
            if self._blocks[holder][-1] == key:
                self._remove(holder)

    def _remove(self, page: int) -> list[bytes]:
        keys = self._blocks.pop(page)
        for key in keys:
            self._holders[key].remove(page)
            if not self._holders[key]:
                del self._holders[key]
        self._pages.drop(page)
        return keys
