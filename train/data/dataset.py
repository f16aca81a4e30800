"""Batches of packed documents, with random access.

Batch n is a function of the files and the settings: it depends neither on the number of processes
nor on the batches read before it. So the state of the data is just the step number.

Axis letters: T tokens of a pack.
"""

import bisect
import sys
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from . import packing
from .documents import Documents
from .packing import Packing, PackSettings

Arrays = dict[str, np.ndarray]
_WELL_FILLED = 0.5
_AHEAD = 2  # batches to prefetch


class Packs:
    """The packs of one file over all epochs, with random access.

    Pack i is a dictionary of arrays [T]: `tokens` int32; `trained` bool, whether the token is a
    training target (never the first of a document); `document` int32, 0 for padding and 1, 2, ...
    for the pack's documents; `position` int32, the token's position in its document.
    """

    def __init__(self, documents: Documents, settings: PackSettings, *, epochs: int | None = None):
        """Pack the first epoch.

        Args:
          documents: documents of one file.
          settings: how to pack them.
          epochs: number of epochs; None: unlimited.

        Raises:
          ValueError: see `packing.pack`.
        """
        self._documents = documents
        self._settings = settings
        self._epochs = epochs
        self._packings: dict[int, Packing] = {}
        self._first = [0]  # first pack of each packed epoch, and of the next one
        self._lock = threading.RLock()
        self.packing(0)
        for epoch in range(epochs or 0):
            self._first.append(self._first[-1] + len(self.packing(epoch)))

    def packing(self, epoch: int) -> Packing:
        """The packing of one epoch, counted from 0."""
        with self._lock:
            if epoch not in self._packings:
                # Around the end of an epoch, threads may still read two epochs.
                while len(self._packings) > 1:
                    del self._packings[min(self._packings)]
                self._packings[epoch] = packing.pack(
                    self._documents.lengths_D,
                    self._settings,
                    epoch=epoch,
                    where=self._documents.where,
                    trained_S=self._documents.trained_S,
                )
            return self._packings[epoch]

    def notes(self, *, waste: bool = True) -> list[str]:
        """Sentences about unused parts of the file, and with `waste` about unfilled packs."""
        path, report, first = self._documents.path, self._documents.report, self.packing(0)
        notes = []
        if report.wrong:
            notes.append(f"{report.wrong:,} of {report.rows:,} rows are invalid and left out.")
        if report.unspoken:
            notes.append(
                f"the reasoning of {report.unspoken:,} messages is left out: thinking_mode is"
                " 'chat', drop_thinking removes it from earlier turns, or they answer a task."
            )
        if first.untrained:
            notes.append(
                f"{first.untrained:,} documents or pieces of documents have no token to train"
                f" within seq_len, {first.seq_len:,}, and are left out."
            )
        if waste and first.efficiency < _WELL_FILLED:
            notes.append(
                f"only {first.efficiency:.0%} of the packs' positions hold a token; documents start"
                f" at multiples of {packing.ALIGNMENT}, so join short ones, or lower seq_len if"
                " packs are not filled."
            )
        return [f"{path}: {note}" for note in notes]

    def __len__(self) -> int:
        """Number of packs in all epochs."""
        return sys.maxsize if self._epochs is None else self._first[-1]

    def __getitem__(self, index: int) -> Arrays:
        """Pack number `index`, counted through all epochs."""
        with self._lock:
            while index >= self._first[-1]:
                self._first.append(self._first[-1] + len(self.packing(len(self._first) - 1)))
            epoch = bisect.bisect_right(self._first, index) - 1
            packing = self.packing(epoch)
        return _fill(self._documents, packing, index - self._first[epoch])


def batches(
    sources: Sequence[Packs],
    *,
    batch: int,
    part: Sequence[int] | None = None,
    weights: Sequence[int | float] | None = None,
) -> grain.MapDataset:
    """A grain dataset whose element n is this process's part of step n's batch.

    Args:
      sources: files to mix. A finite source must be the only one; its last batch is padded.
      batch: packs per step, over all processes.
      part: indices of the packs that this process loads, see `share`; None: all.
      weights: relative share of each source; None: equal shares.

    Raises:
      ValueError: sources, part or weights are invalid.
    """
    part = range(batch) if part is None else part
    weights = [1.0] * len(sources) if weights is None else weights
    if not sources:
        raise ValueError("sources is empty; give at least one.")
    if len(weights) != len(sources) or not all(0 < w < float("inf") for w in weights):
        raise ValueError(f"weights are {list(weights)}; give {len(sources)} numbers above 0.")
    if not part or min(part) < 0 or max(part) >= batch:
        raise ValueError(f"part is {part}; give indices of packs below batch, {batch}.")
    if len(sources) > 1 and any(len(source) < sys.maxsize for source in sources):
        raise ValueError("Sources with a number of epochs cannot be mixed; leave epochs out.")
    datasets = [grain.MapDataset.source(source) for source in sources]
    packs = grain.MapDataset.mix(datasets, weights) if len(datasets) > 1 else datasets[0]
    return grain.MapDataset.source(_Batches(packs, batch, part))


def share(batch: int, group: int, groups: int) -> range:
    """The packs of a batch that one of several groups of devices gets: a contiguous, equal share.

    Raises:
      ValueError: the batch cannot be divided evenly.
    """
    if batch % groups:
        raise ValueError(f"batch is {batch}; use a multiple of the {groups} groups of devices.")
    size = batch // groups
    return range(group * size, (group + 1) * size)


def iterate(dataset: grain.MapDataset, *, step: int = 0) -> grain.DatasetIterator:
    """Iterate over batches from a step on, prefetching a few of them.

    The iterator's state, `{"next_index": step}`, is the same in every process.
    """
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": step})
    return iterator


class _Batches:
    """One process's part of every batch, with random access."""

    def __init__(self, packs: Any, batch: int, part: Sequence[int]):
        self._packs = packs
        self._batch = batch
        self._part = part

    def __len__(self) -> int:
        return -(-len(self._packs) // self._batch)

    def __getitem__(self, index: int) -> Arrays:
        packs = [self._pack(index * self._batch + i) for i in self._part]
        return {name: np.stack([pack[name] for pack in packs]) for name in packs[0]}

    def _pack(self, index: int) -> Arrays:
        if index < len(self._packs):
            return self._packs[index]
        return {name: np.zeros_like(array_T) for name, array_T in self._packs[0].items()}


def _fill(documents: Documents, packing: Packing, pack: int) -> Arrays:
    dtypes = {"tokens": np.int32, "trained": np.bool_, "document": np.int32, "position": np.int32}
    arrays = {name: np.zeros(packing.seq_len, dtype) for name, dtype in dtypes.items()}
    pieces = range(packing.first_K1[pack], packing.first_K1[pack + 1])
    for number, piece in enumerate(pieces, 1):
        begin, length = packing.begin_P[piece], packing.length_P[piece]
        place = slice(packing.start_P[piece], packing.start_P[piece] + length)
        document = documents[int(packing.document_P[piece])]
        arrays["tokens"][place] = document.ids_N[begin : begin + length]
        arrays["trained"][place] = document.trained_N[begin : begin + length]
        arrays["trained"][place.start] = False
        arrays["document"][place] = number
        arrays["position"][place] = np.arange(length)
    return arrays
