"""`v4jax inspect`: resolve a path or name to a configuration, and print its figures."""

import collections
import dataclasses
import difflib
import math
import os
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from v4jax import arguments, presets
from v4jax.checkpoints import (
    config_file,
    hub,
    native,
    release_weights,
    remote,
    safetensors_directory,
)
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_file import DTYPE_NAMES, open_safetensors
from v4jax.facts import DEVICES, GIB, Report, devices, report
from v4jax.model.config import CONFIG, ModelConfig
from v4jax.model.segments import segments

_CONTEXTS = {"128K": 2**17, "1M": 2**20}
_FP4 = "FP4, two per byte"
_DTYPE_NOTES = {"I8": f"I8 ({_FP4})", "U8": f"U8 ({_FP4})", "F8_E8M0": "F8_E8M0 (scales)"}
_CACHE_NOTES = {"fp8": "fp8 (--cache-dtype fp8)", "fp8 + fp4": "fp8 + fp4 (DeepSeek's)"}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a path or name refers to.

    Attributes:
      what: a one-line description.
      config: its configuration.
      held: bytes by dtype in its files; None if there is only a configuration.
    """

    what: str
    config: ModelConfig
    held: dict[str, int] | None = None


@arguments.checked(name=arguments.PATH, revision=arguments.optional(arguments.TEXT))
def find(name: str | Path, *, revision: str | None = None) -> Subject:
    """Resolve a name: an existing path, else a preset, else a Hub id.

    Headers of a local checkpoint are read and checked; from the Hub only `config.json` is read.

    Raises:
      ValueError: the name is none of these, or the checkpoint is damaged or not DeepSeek-V4.
    """
    name = os.fspath(name)
    is_preset = name in presets.names()
    if is_preset and revision is not None:
        raise ValueError(
            f"{name}: is a preset and has no revisions; leave revision {revision!r} out."
        )
    path = Path(os.path.expanduser(name)) if is_preset else hub.local(name, revision)
    if path is not None and path.is_dir():
        return _directory(path)
    if path is not None and path.exists():
        return Subject(f"{path}", config_file.read(path))
    if is_preset:
        return Subject(f"preset {name}", presets.get(name))
    try:
        folder = hub.resolve(name, revision=revision, allow_patterns=[safetensors_directory.CONFIG])
    except CheckpointError as error:
        names = presets.names()
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(
            f"{error} It is not a preset either; the presets are {', '.join(names)}.{hint}"
        ) from error
    where = name if remote.is_url(name) else f"{name} on the Hub"
    return Subject(where, config_file.read(folder / safetensors_directory.CONFIG))


@arguments.checked(name=arguments.PATH)
def config_of(name: str | Path) -> ModelConfig:
    """The configuration of a directory, a `config.json`, a preset or a Hub id; see `find`."""
    return find(name).config


def _directory(path: Path) -> Subject:
    if native.is_native(path):
        return _native(path)
    config = path / safetensors_directory.CONFIG
    weights = (path / safetensors_directory.SINGLE, path / safetensors_directory.INDEX)
    if config.is_file() and not any(file.is_file() for file in weights):
        return Subject(f"{config}, without weights next to it", config_file.read(config))
    tensors, cfg, _ = release_weights.open_release(path)
    with safetensors_directory.Checkpoint.open(path) as files:
        held = _count((files.info(name).dtype, files.info(name).nbytes) for name in files.names)
    return Subject(f"{path}: Hugging Face checkpoint, {len(tensors.tensors):,} tensors", cfg, held)


def _native(path: Path) -> Subject:
    opened = native.Native(path)
    arrays = [
        opened.array(array)
        for leaf, form in opened.manifest.leaves.items()
        for array in native.array_names(leaf, form)
    ]
    sizes = [(a.dtype, math.prod(a.shape)) for a in arrays]
    held = [(DTYPE_NAMES[dtype], count * dtype.itemsize) for dtype, count in sizes]
    for file in sorted((path / native.EXTRAS).rglob("*.safetensors")):
        extra = open_safetensors(file)
        held += [(extra.info(name).dtype, extra.info(name).nbytes) for name in extra.names]
    what = f"{path}: native checkpoint, converted with --weights {opened.manifest.weights}"
    return Subject(what, opened.config, _count(held))


def _count(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for dtype, nbytes in sizes:
        total[dtype] += nbytes
    return dict(sorted(total.items()))


@arguments.checked(cfg=CONFIG, what=arguments.TEXT)
def show(cfg: ModelConfig, *, what: str = "", held: dict[str, int] | None = None) -> None:
    """Print the figures of a configuration.

    Args:
      cfg: the configuration.
      what: a line that describes its source.
      held: bytes by dtype in the files; by default those of a release are computed.
    """
    facts = report(cfg)
    sizes = facts.bytes_by_dtype if held is None else held
    console = Console(highlight=False, soft_wrap=True)
    if what:
        console.print(what, markup=False)
    console.print(f"DeepSeek-V4 {facts.variant}; chat format '{facts.revision}'")
    for table in (
        _layers(cfg, facts),
        _segments(cfg),
        _parameters(cfg, facts),
        _bytes(sizes, held is None),
        _cache(cfg, facts),
        _fit(sum(sizes.values())),
    ):
        console.print()
        console.print(table)


def _table(*columns: str) -> Table:
    """A table with a column of text, equally wide in all tables, and columns of numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column(columns[0], min_width=26)
    for column in columns[1:]:
        table.add_column(column, justify="right", min_width=10)
    return table


def _layers(cfg: ModelConfig, facts: Report) -> Table:
    table = _table("Layers: attention + experts", "")
    for kind, count in facts.layers.items():
        table.add_row(kind, str(count))
    table.add_row("total", str(cfg.num_hidden_layers))
    return table


def _segments(cfg: ModelConfig) -> Table:
    table = _table("Layers of one compiled loop", "repeats")
    for part in segments(cfg.layers):
        kinds = "\n".join(f"{kind.attention} + {kind.ffn}" for kind in part.pattern)
        table.add_row(kinds, str(part.repeats))
    return table


def _parameters(cfg: ModelConfig, facts: Report) -> Table:
    table = _table("Parameters", "")
    table.add_row("backbone", f"{facts.total:,}")
    table.add_row("  active per token", f"{facts.active:,}")
    if facts.mtp:
        table.add_row("DSpark drafter" if cfg.dspark else "MTP", f"{facts.mtp:,}")
    return table


def _bytes(sizes: dict[str, int], computed: bool) -> Table:
    table = _table("Bytes of the release" if computed else "Bytes in the files", "")
    for dtype, nbytes in sizes.items():
        table.add_row(_DTYPE_NOTES.get(dtype, dtype), f"{nbytes:,}")
    table.add_row("total", f"{sum(sizes.values()):,}")
    return table


def _cache(cfg: ModelConfig, facts: Report) -> Table:
    longest = cfg.max_position_embeddings
    contexts = {name: n for name, n in _CONTEXTS.items() if n <= longest} or {
        f"{longest:,}": longest
    }
    table = _table("Cache", "B/token", *(f"at {name}" for name in contexts))
    for form, rate in facts.cache_bytes.items():
        table.add_row(
            _CACHE_NOTES.get(form, form), f"{rate:,}", *(_size(rate * n) for n in contexts.values())
        )
    table.add_row("plus, per sequence", "", *[_size(facts.state_bytes)] * len(contexts))
    return table


def _fit(nbytes: int) -> Table:
    """The devices that the weights need, and the memory left for the cache."""
    table = _table("Devices that hold the weights", "", "left for cache")
    for name, count in devices(nbytes).items():
        left = count * DEVICES[name] * GIB - nbytes
        table.add_row(f"{name}, {DEVICES[name]:g} GiB", str(count), _size(left))
    return table


def _size(nbytes: int | float) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.2f} MiB"
