"""Pages and snapshots of sequences: what a prompt reuses, what it leaves, what makes way.

A prefix that another request has computed is found in the device's pages, or else in the store (RAM
and disk), from which it is loaded. Full pages of it are shared; a page that it ends inside is
copied. Only blocks that prefill computed are published, so that a reused prefix has the bits that
computing it again would give.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Any, Protocol

from v4jax.engine.pages import Pages
from v4jax.engine.prefix import Hit, Prefix
from v4jax.engine.request import Request
from v4jax.engine.sequence import Sequence
from v4jax.engine.store import Store
from v4jax.model.cache import BLOCK


class Device(Protocol):
    """What is done with arrays, in order."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page's entries."""

    def read_page(self, page: int, blocks: int) -> list[bytes]:
        """The entries of a page's first blocks."""
        ...

    def write_block(self, page: int, position: int, block: bytes) -> None:
        """Write a block's entries to its position in a page."""

    def snapshot(self, row: int, length: int) -> Any:
        """The state of a row at a multiple of BLOCK, besides its pages."""

    def restore(self, row: int, length: int, snapshot: Any) -> None:
        """Give a row the state of a snapshot."""

    def pack(self, snapshot: Any) -> bytes:
        """A snapshot as bytes."""
        ...

    def unpack(self, content: bytes) -> Any:
        """The snapshot that was packed."""

    def save(self, sequence: Sequence) -> Any:
        """The state of a row and its pages, on the host."""

    def resume(self, row: int, sequence: Sequence) -> None:
        """Write what was saved of a sequence to a row and to its new pages."""


class Memory:
    """The pages of an engine. The first of each group belongs to nobody; see `paging.SCRATCH`."""

    def __init__(
        self,
        device: Device,
        pages: Pages,
        prefix: Prefix,
        store: Store | None,
        models: Mapping[str | None, str],
        *,
        interval: int,
    ) -> None:
        """Set up empty pages.

        Args:
          device: holds the arrays.
          pages: the pages, none of them in use.
          prefix: the index of prefixes in them.
          store: where evicted prefixes go; None to forget them.
          models: what identifies the weights under each adapter, and under None.
          interval: tokens between snapshots of a long prompt.
        """
        self._device, self._pages, self._prefix, self._store = device, pages, prefix, store
        self._models, self._interval = models, interval
        for group in range(pages.groups):
            pages.take(group)

    def keys(self, request: Request, known: Many[bytes] = ()) -> list[bytes]:
        """Keys of the blocks before a prompt's last token; `known` are the first of them.

        There are none if no prefix is reused.
        """
        if not self._prefix.max_snapshots:
            return []
        adapter = self._models[request.adapter]
        return self._prefix.keys(request.tokens[:-1], adapter, request.salt, known)

    def groups(self, sequence: Sequence) -> list[int]:
        """All groups, those first that suit a sequence: which have its prefix, or many free pages.

        A prefix of another group is copied.
        """
        groups = [*range(self._pages.groups)]
        if len(groups) == 1:
            return groups
        known = _leading(sequence.keys, lambda key: key in self._prefix)
        page = self._prefix.page_of(sequence.keys[known - 1]) if known else None
        home = None if page is None else self._pages.group(page)
        return sorted(groups, key=lambda group: (group != home, -self._pages.free_in(group)))

    def open(self, sequence: Sequence, group: int, row: int, tokens: int) -> bool:
        """Open a sequence on a row, with pages of its group; False if too few are free.

        It begins with what is known of its prompt, or goes on where it was if it was saved.
        """
        sequence.group = group
        if sequence.saved is not None:
            if not self.extend(sequence, tokens):
                return False
            self._device.resume(row, sequence)
            sequence.saved = None
            return True
        hit = self._hit(sequence)
        full = hit.pages[: hit.blocks // self._prefix.blocks_per_page]
        shared = [page for page in full if self._pages.group(page) == group]
        for page in shared:
            self._pages.share(page)
        missing = self._count(tokens) - len(shared)
        if not self._reserve(missing, group):
            for page in shared:
                self._pages.drop(page)
            return False
        new = [self._pages.take(group) for _ in range(missing)]
        sequence.pages = [page if page in shared else new.pop() for page in full] + new
        # The last page, which the prefix may end inside, is the only one that may have made way:
        # its entries are still there until another page is copied to it.
        for source, target in reversed([*zip(hit.pages, sequence.pages, strict=False)]):
            if source != target:
                self._device.copy_page(source, target)
        if hit.blocks:
            self._device.restore(row, hit.blocks * BLOCK, hit.snapshot)
        sequence.known = hit.branch
        sequence.length = sequence.usage.cached_tokens = hit.blocks * BLOCK
        return True

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Give a sequence pages for this many tokens in all; False if too few are free."""
        count = self._count(tokens) - len(sequence.pages)
        if count > 0 and not self._reserve(count, sequence.group):
            return False
        sequence.pages += [self._pages.take(sequence.group) for _ in range(count)]
        return True

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's pages back; what is published of them stays known."""
        for page in sequence.pages:
            self._pages.drop(page)
        sequence.pages = []
        if sequence.saved is None:
            sequence.length = 0

    def save(self, sequence: Sequence) -> None:
        """Save a decoded sequence on the host, to go on later."""
        sequence.saved = self._device.save(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Publish the blocks that prefill has computed, with a snapshot where one is due."""
        keys = sequence.keys[: sequence.length // BLOCK]
        if not keys:
            return
        self._prefix.publish(keys, sequence.pages)
        ends = sequence.known * BLOCK, sequence.reusable
        due = sequence.length in ends or sequence.length % self._interval == 0
        if due and keys[-1] not in self._prefix.snapshots:
            snapshot = self._device.snapshot(sequence.row or 0, sequence.length)
            self._keep(self._prefix.add_snapshot(keys[-1], snapshot))

    def next_snapshot(self, sequence: Sequence) -> int:
        """Where the next snapshot of a prompt is due: no chunk goes beyond.

        It is the end of the prompt's reusable part, of what others share with it, or an interval.
        """
        regular = (sequence.length // self._interval + 1) * self._interval
        ends = regular, sequence.known * BLOCK, sequence.reusable
        return min(end for end in ends if end > sequence.length)

    def usage(self) -> dict[str, Any]:
        """Numbers of pages, of snapshots and of bytes outside the device."""
        count = self._pages.count - self._pages.groups
        used = count - self._pages.free
        return {
            "pages": count,
            "pages_used": used,
            "page_usage": used / count,
            "pages_cached": self._prefix.evictable(),
            "snapshots": len(self._prefix.snapshots),
            "ram_bytes": self._store.bytes_in_ram if self._store else 0,
            "disk_bytes": self._store.bytes_on_disk if self._store else 0,
        }

    def close(self) -> None:
        """Move all prefixes that no sequence uses to the store, and close it."""
        if self._store is not None:
            # Page by page: the store drops what it cannot write at once.
            while self._prefix.evictable():
                self._evict(1, None)
                self._store.flush()
            self._keep([*self._prefix.snapshots.items()])
            self._store.flush()
            self._store.close()

    def _hit(self, sequence: Sequence) -> Hit:
        """The longest prefix on the device, after loading what the store has."""
        if sequence.request.needs_all:
            return Hit(0, [], None, 0)
        self._recall(sequence.keys, sequence.group)
        return self._prefix.match(sequence.keys, sequence.prompt)

    def _count(self, tokens: int) -> int:
        """Number of pages of some tokens."""
        return -(-tokens // (self._prefix.blocks_per_page * BLOCK))

    def _reserve(self, count: int, group: int) -> bool:
        """Free a group's pages until there are `count`; False, without evicting, if too few are."""
        missing = count - self._pages.free_in(group)
        if missing > self._prefix.evictable(group):
            return False
        self._evict(missing, group)
        return True

    def _evict(self, count: int, group: int | None) -> None:
        for page, keys in self._prefix.evict(max(count, 0), group):
            if self._store is not None:
                blocks = self._device.read_page(page, len(keys))
                for key, block in zip(keys, blocks, strict=True):
                    self._store.put(b"b" + key, block)
                # Without a snapshot the blocks would be of no use after the end of the process.
                ends = [key for key in keys if b"s" + key not in self._store]
                snapshots = self._prefix.snapshots
                self._keep([(key, snapshots[key]) for key in ends if key in snapshots])

    def _keep(self, dropped: list[tuple[bytes, Any]]) -> None:
        """Put snapshots that the index dropped into the store."""
        if self._store is not None:
            for key, snapshot in dropped:
                self._store.put(b"s" + key, self._device.pack(snapshot))

    def _recall(self, keys: list[bytes], group: int) -> None:
        """Load what the store has of a chain, up to its last snapshot, and publish it."""
        store, prefix = self._store, self._prefix
        if store is None:
            return
        has_snapshot = lambda key: key in prefix.snapshots or b"s" + key in store
        resident = _leading(keys, lambda key: key in prefix)
        known = _leading(keys, lambda key: key in prefix or b"b" + key in store)
        end = max((i + 1 for i in range(known) if has_snapshot(keys[i])), default=0)
        if end > resident:
            end = self._load(keys[:end], resident, store, group)
        for key in reversed(keys[:end]):
            if key in prefix.snapshots:
                return
            content = store.get(b"s" + key)
            if content is not None:
                self._keep(prefix.add_snapshot(key, self._device.unpack(content)))
                return

    def _load(self, keys: list[bytes], resident: int, store: Store, group: int) -> int:
        """Load blocks of a chain from the store to a group's pages; how many are known then."""
        n = self._prefix.blocks_per_page
        ends = [min(end, resident) - 1 for end in range(n, resident + n, n)]
        held = [page for end in ends if (page := self._prefix.page_of(keys[end])) is not None]
        first = resident // n
        pages = held[:first]
        for page in pages:
            self._pages.share(page)
        count = -(-len(keys) // n) - first
        if self._reserve(count, group):
            pages += [self._pages.take(group) for _ in range(count)]
            for page in held[first:]:
                self._device.copy_page(page, pages[first])
            for i in range(resident, len(keys)):
                block = store.get(b"b" + keys[i])
                if block is None:
                    break
                self._device.write_block(pages[i // n], i % n, block)
                resident = i + 1
            self._prefix.publish(keys[:resident], pages)
        for page in pages:
            self._pages.drop(page)
        return resident


def _leading(keys: list[bytes], known: Any) -> int:
    """How many keys in a row, from the first, are known."""
    return next((i for i, key in enumerate(keys) if not known(key)), len(keys))
