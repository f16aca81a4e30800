"""Packing of documents into sequences of equal length, from their lengths and trained tokens.

Every document starts at a multiple of 128, so that no window compressed by V4 has tokens of two
documents, and a packed document is computed as if it were alone.

Axis letters: D documents, P pieces of documents, K packs, S tokens of all documents.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

ALIGNMENT = 128  # the least common multiple of the compression ratios, 4 and 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How documents are packed.

    Attributes:
      seq_len: tokens per pack, a multiple of 128.
      too_long: a document longer than a pack: 'error' rejects it, 'truncate' drops the rest,
        'split' cuts it into pieces that do not attend to each other; the first token of each piece
        is not trained.
      untrained: a piece without a token to train, e.g. because the answer is cut off: 'drop' leaves
        it out, 'error' rejects it.
      window: number of pieces packed together. More fill packs better; fewer make packs independent
        of distant rows.
      seed: seed of the shuffling order.
    """

    seq_len: int
    too_long: str = "error"
    untrained: str = "drop"
    window: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that cannot pack."""
        if self.seq_len < ALIGNMENT or self.seq_len % ALIGNMENT:
            raise ValueError(f"seq_len is {self.seq_len}; use a multiple of {ALIGNMENT}.")
        if self.too_long not in ("error", "truncate", "split"):
            raise ValueError(f"too_long is '{self.too_long}'; use error, truncate or split.")
        if self.untrained not in ("drop", "error"):
            raise ValueError(f"untrained is '{self.untrained}'; use drop or error.")
        if self.window < 1:
            raise ValueError(f"window is {self.window}; use 1 or more.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; use 0 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """The packing of one epoch: the position of each piece of a document.

    Attributes:
      seq_len: tokens per pack.
      document_P: document of each piece.
      begin_P: start of each piece in its document.
      length_P: number of tokens in each piece.
      start_P: start of each piece in its pack.
      first_K1: first piece of each pack, and finally the number of pieces.
      too_long: number of documents that were truncated or split.
      untrained: number of pieces left out because none of their tokens is trained.
      dropped: number of tokens that are in no pack.
      trained: number of trained tokens.
    """

    seq_len: int
    document_P: Int[np.ndarray, " P"]
    begin_P: Int[np.ndarray, " P"]
    length_P: Int[np.ndarray, " P"]
    start_P: Int[np.ndarray, " P"]
    first_K1: Int[np.ndarray, " K1"]
    too_long: int
    untrained: int
    dropped: int
    trained: int

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.first_K1) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens in all packs."""
        return int(self.length_P.sum())

    @property
    def efficiency(self) -> float:
        """Fraction of the packs' positions that hold a token."""
        return self.tokens / (len(self) * self.seq_len)


def pack(
    lengths_D: Int[np.ndarray, " D"],
    settings: PackSettings,
    *,
    epoch: int = 0,
    where: Callable[[int], str] = "document {}".format,
    trained_S: Bool[np.ndarray, " S"] | None = None,
) -> Packing:
    """Pack every document once; equal arguments give the same packing on any machine.

    Args:
      lengths_D: number of tokens in each document.
      settings: how to pack.
      epoch: number of the epoch; each has its own order.
      where: describes a document in an error, by its index.
      trained_S: whether each token is trained; None: all are.

    Raises:
      ValueError: a document is longer than a pack or has nothing to train, and the settings make
        that an error; or no document has anything to train.
    """
    document_P, begin_P = _pieces(lengths_D, settings, where)
    length_P = np.minimum(lengths_D[document_P] - begin_P, settings.seq_len)
    trained_P = length_P
    if trained_S is not None:
        start_P = (np.cumsum(lengths_D) - lengths_D)[document_P] + begin_P
        trained_P = _count_trained(trained_S, start_P, length_P)
    kept_P = trained_P > 0
    _check_trained(kept_P, document_P, settings, where)
    document_P, begin_P, length_P = document_P[kept_P], begin_P[kept_P], length_P[kept_P]
    blocks_P = -(-length_P // ALIGNMENT)
    pack_P = np.zeros_like(length_P)
    packs = 0
    shuffled_P = _order(len(length_P), settings.seed, epoch, 0)
    for first in range(0, len(length_P), settings.window):
        window = shuffled_P[first : first + settings.window]
        placement = best_fit(blocks_P[window].tolist(), settings.seq_len // ALIGNMENT)
        pack_P[window] = np.array(placement) + packs
        packs += max(placement) + 1
    pack_P = _order(packs, settings.seed, epoch, 1)[pack_P]

    order_P = np.argsort(pack_P, kind="stable")
    first_K1 = np.cumsum([0, *np.bincount(pack_P)])
    before_P = np.cumsum(blocks_P[order_P]) - blocks_P[order_P]
    start_P = before_P - np.repeat(before_P[first_K1[:-1]], np.diff(first_K1))
    return Packing(
        seq_len=settings.seq_len,
        document_P=document_P[order_P],
        begin_P=begin_P[order_P],
        length_P=length_P[order_P],
        start_P=start_P * ALIGNMENT,
        first_K1=first_K1,
        too_long=int((lengths_D > settings.seq_len).sum()),
        untrained=int((~kept_P).sum()),
        dropped=int(lengths_D.sum() - length_P.sum()),
        trained=int(trained_P.sum()),
    )


def best_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """The pack of each item: largest first, each goes to the fullest pack that has room for it."""
    pack_of = [0] * len(sizes)
    packs = 0
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set if by_room[r] has a pack, to find the least sufficient room at once
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[item]
        if sufficient := rooms >> size:
            room = size + (sufficient & -sufficient).bit_length() - 1
            pack = by_room[room].pop()
            rooms ^= 0 if by_room[room] else 1 << room
        else:
            room, pack, packs = capacity, packs, packs + 1
        pack_of[item] = pack
        by_room[room - size].append(pack)
        rooms |= 1 << (room - size)
    return pack_of


def _pieces(
    lengths_D: Int[np.ndarray, " D"], settings: PackSettings, where: Callable[[int], str]
) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    """The document and the start of each piece; none is longer than a pack."""
    long = np.flatnonzero(lengths_D > settings.seq_len)
    if len(long) and settings.too_long == "error":
        raise ValueError(
            f"{where(int(long[0]))} has {lengths_D[long[0]]:,} tokens, but seq_len is"
            f" {settings.seq_len:,} ({len(long):,} of {len(lengths_D):,} documents are too long);"
            " raise it, or set too_long to truncate or split."
        )
    if settings.too_long == "truncate":
        return np.arange(len(lengths_D)), np.zeros(len(lengths_D), np.int64)
    count_D = -(-lengths_D // settings.seq_len)
    document_P = np.repeat(np.arange(len(lengths_D)), count_D)
    index_P = np.arange(len(document_P)) - np.repeat(np.cumsum(count_D) - count_D, count_D)
    return document_P, index_P * settings.seq_len


def _count_trained(
    trained_S: Bool[np.ndarray, " S"],
    start_P: Int[np.ndarray, " P"],
    length_P: Int[np.ndarray, " P"],
) -> Int[np.ndarray, " P"]:
    """Number of trained tokens in each piece; its first token never counts."""
    # One more element, so that the last piece may end there.
    marks = np.append(trained_S, False)
    marks[start_P] = False
    edges = np.stack([start_P, start_P + length_P], axis=1).ravel()
    return np.add.reduceat(marks, edges, dtype=np.int64)[::2]


def _check_trained(
    kept_P: Bool[np.ndarray, " P"],
    document_P: Int[np.ndarray, " P"],
    settings: PackSettings,
    where: Callable[[int], str],
) -> None:
    untrained = document_P[~kept_P]
    if len(untrained) and (settings.untrained == "error" or not kept_P.any()):
        raise ValueError(
            f"{where(int(untrained[0]))} has no token to train within seq_len, {settings.seq_len:,}"
            f" (the same is true of {len(untrained):,} of {len(kept_P):,} documents or pieces);"
            " raise it, or leave such rows out."
        )


def _order(count: int, *seed: int) -> Int[np.ndarray, " count"]:
    """A random permutation. NumPy guarantees stability only for raw streams of bit generators."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
