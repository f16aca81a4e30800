"""Sizes of an engine, and what its cache depends on."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from v4jax.arguments import shown
from v4jax.decoding.loaded import Loaded
from v4jax.engine.inputs import Shape
from v4jax.engine.programs import Static
from v4jax.model import cache, paging, sharding
from v4jax.model.cache import BLOCK
from v4jax.model.config import ModelConfig

MOST_DRAFTS = cache.SPARE - 1
# Tokens of a page if the context is that long.
PAGE = 4096
# Kernels of dense attention take pages of this many entries or more.
_ENTRIES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and limits of an engine; programs depend on the first six.

    Attributes:
      max_seqs: sequences that run at once; rounded up to a multiple of the mesh's groups of rows.
      context: most tokens of a prompt and its answer.
      page: tokens of a page; PAGE, or less if the context is shorter.
      memory: bytes of the cache, sequences and prefixes, on all devices that share it; by default
        each sequence can be full.
      pages: pages of the cache, instead of `memory`.
      chunk: tokens of a prompt that are read at once.
      drafts: tokens that the MTP block drafts for each token.
      cache_dtype: 'fp8' holds compressed entries in the bytes that the official numerics round
        them to, FP8 and the indexer's FP4: the same answers in 60% of the memory. None: in the
        model's dtype.
      queue: requests that may wait; more are refused.
      snapshots: prefixes' ends that are kept on the device. With 0 no prefix is reused, nor if a
        compression ratio does not divide BLOCK.
      interval: tokens between the ends of prefixes that are kept of a long prompt.
      cache_ram: bytes of RAM for prefixes that leave the device.
      cache_dir: directory for prefixes that leave RAM, and for the next start.
      cache_disk: bytes of that directory.
      hang_seconds: a step that takes longer is reported, and the engine is not ready.
      top: most alternatives that can be reported with each token.
      scores: whether prompts can be scored.
      routed_experts: whether the experts chosen for each token can be reported.
    """

    max_seqs: int = 16
    context: int = 65536
    page: int | None = None
    memory: int | None = None
    pages: int | None = None
    chunk: int = 512
    drafts: int = 0
    cache_dtype: str | None = None
    queue: int = 1024
    snapshots: int = 256
    interval: int = 8192
    cache_ram: int = 0
    cache_dir: Path | None = None
    cache_disk: int = 64 * 2**30
    hang_seconds: float = 300
    top: int = 20
    scores: bool = True
    routed_experts: bool = False


def drafts_of(speculate: str | None, model: Loaded) -> int:
    """The number of drafts that 'mtp:2' asks for."""
    if speculate is None:
        return 0
    kind, _, count = speculate.partition(":")
    if kind != "mtp" or not (count or "1").isdecimal() or not 1 <= int(count or 1) <= MOST_DRAFTS:
        raise ValueError(
            f"speculate is {shown(speculate)}; give 'mtp:K' with K from 1 to {MOST_DRAFTS}."
        )
    if not model.config.num_nextn_predict_layers:
        raise ValueError("speculate='mtp' needs an MTP block, and this checkpoint has none.")
    return int(count or 1)


def page_of(context: int, cfg: ModelConfig, platform: str) -> int:
    """Tokens of a page for sequences of up to `context` tokens, on devices of a platform."""
    ratios = [kind.ratio for kind in cfg.layers]
    least = 1 if platform == "cpu" else _ENTRIES * max(ratios)
    unit = paging.page_unit(cfg)
    return -(-max(least, min(PAGE, context)) // unit) * unit


def check(settings: Settings, model: Loaded) -> Settings:
    """Settings with their defaults filled in.

    Raises:
      ValueError: a setting is out of range, or the model does not allow it.
    """
    for name in ("max_seqs", "context", "chunk", "queue", "interval", "snapshots"):
        least = 0 if name == "snapshots" else 1
        if getattr(settings, name) < least:
            value = shown(getattr(settings, name))
            raise ValueError(f"{name} is {value}; it must be {least} or more.")
    limit = model.config.max_position_embeddings
    if settings.context > limit:
        raise ValueError(f"context is {settings.context}; the model's own is {limit}.")
    unit = paging.page_unit(model.config)
    for name, factor in (("chunk", BLOCK), ("interval", BLOCK), ("page", unit)):
        if (getattr(settings, name) or 0) % factor:
            raise ValueError(f"{name} is {getattr(settings, name)}; use a multiple of {factor}.")
    if settings.cache_dtype is not None:
        paging.require_exact(settings.cache_dtype, model.numerics, model.dtype)
    groups = sharding.row_groups(model.mesh)
    page = settings.page or page_of(settings.context, model.config, model.platform)
    row_pages = -(-settings.context // page)
    settings = dataclasses.replace(
        settings,
        page=page,
        max_seqs=-(-settings.max_seqs // groups) * groups,
        snapshots=0 if unit != BLOCK else settings.snapshots,
        top=min(settings.top, model.config.vocab_size),
    )
    pages = settings.pages or groups + settings.max_seqs * row_pages
    if settings.memory is not None and settings.pages is None:
        fixed, each = _cache_bytes(settings, model)
        pages = max(0, settings.memory - fixed) // each
    pages -= pages % groups
    if pages <= groups * row_pages:
        raise ValueError(
            f"The cache has {pages} pages of {page} tokens, but a sequence of {settings.context} "
            f"tokens needs {row_pages}, and one more is scratch{_in_each(groups)}: raise memory or "
            "lower context."
        )
    return dataclasses.replace(settings, pages=pages)


def _in_each(groups: int) -> str:
    return f", in each of {groups} groups of devices" if groups > 1 else ""


def _cache_bytes(settings: Settings, model: Loaded) -> tuple[int, int]:
    """Bytes of a cache without pages, and of a page."""

    def nbytes(pages: int) -> int:
        sizes = {"rows": settings.max_seqs, "pages": pages, "page": settings.page or PAGE}
        how = {"dtype": model.dtype, "entries": settings.cache_dtype, "numerics": model.numerics}
        make = lambda: paging.make(model.config, **sizes, **how, mtp=settings.drafts > 0)
        return sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make))
        )

    return 2 * nbytes(1) - nbytes(2), nbytes(2) - nbytes(1)


def fingerprint(model: Any, static: Static, shape: Shape) -> str:
    """Identifies what entries of the cache depend on: weights, rounding, programs and compiler.

    Of each array some elements are read, spread over all of it.
    """
    digest = hashlib.blake2b(digest_size=16)
    device = jax.devices()[0].device_kind
    sizes = shape.widths, shape.entries
    digest.update(repr((static, sizes, jax.__version__, device)).encode())
    for leaf in jax.tree.leaves(model):
        some = leaf.reshape(-1)[:: max(1, leaf.size // 64)]
        digest.update(np.asarray(some).tobytes() + repr((leaf.shape, leaf.dtype)).encode())
    return digest.hexdigest()
