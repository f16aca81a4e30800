"""The engine's programs as jobs: a step of all rows, and a chunk of a prompt of each group."""

import dataclasses
import functools
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from v4jax import aot, facts
from v4jax.model import params, sharding
from v4jax.model.config import ModelConfig
from v4jax.model.sharding import AnyMesh
from v4jax.model.transformer import Model
from v4jax.pods import jobs, memory
from v4jax.pods.jobs import Move, Work

_PARTS = ("weights", "cache", "rows", "rows", "rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """The engine's decode step, or its program for a chunk of a prompt.

    Attributes:
      cfg: the model's configuration.
      name: 'decode' or 'prefill'.
      context: capacity of a sequence in tokens; every sequence is taken to be full.
      batch: sequences that run at once.
      chunk: tokens of a prompt that are read at once.
      cache_dtype: as for the engine: 'fp8', or None for bfloat16.
      keep_quantised: whether FP8 and FP4 weights stay as they are.
    """

    cfg: ModelConfig
    name: Literal["decode", "prefill"]
    context: int
    batch: int
    chunk: int = 512
    cache_dtype: str | None = "fp8"
    keep_quantised: bool = True

    @property
    def rows(self) -> int:
        return self.batch

    @property
    def compiler_options(self) -> dict[str, Any]:
        return {}

    def sizes(self) -> dict[str, int]:
        """The sizes that the user chose."""
        sizes = {"context": self.context, "batch": self.batch}
        return sizes if self.name == "decode" else sizes | {"chunk": self.chunk}

    def arguments(self, mesh: AnyMesh) -> dict[str, Any]:
        """The weights, the cache and the rows."""
        arrays = aot.arguments(self.cfg, self._step, mesh, **self._options)
        parts: dict[str, Any] = {}
        for part, tree in zip(_PARTS, arrays, strict=True):
            parts[part] = tree if part != "rows" else (*parts.get(part, ()), tree)
        return parts

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The program."""
        return aot.lower(self.cfg, self._step, mesh, **self._options)

    def work(self, mesh: AnyMesh, arguments: dict[str, Any]) -> Work:
        """What a step asks of a device."""
        cfg, groups = self.cfg, sharding.row_groups(mesh)
        rows = jobs.on_each(self.batch, mesh)
        tokens = rows if self.name == "decode" else self.chunk
        total = self.batch if self.name == "decode" else self.chunk * groups
        dense, routed = weight_bytes(self._declared, arguments["weights"], mesh)
        experts = jobs.expected(cfg, tokens, mesh)
        flops = total * self._token_flops / mesh.size
        visible = cache_read(cfg, self.context, self.cache_dtype)
        logits = 16.0 * cfg.vocab_size * (rows if self.name == "decode" else 1)
        fsdp = mesh.shape["fsdp"]
        gathers = (Move("all-gather", fsdp, dense / len(cfg.layers), len(cfg.layers)),)
        return Work(
            flops=flops,
            executed=flops,
            bytes=dense + routed * experts.active + rows * visible,
            temporaries=logits + 3 * jobs.layer_bytes(cfg, tokens, mesh),
            moves=jobs.exchange(cfg, tokens, mesh, 1) + (gathers if fsdp > 1 else ()),
            experts=experts,
            tokens=total,
        )

    @property
    def _step(self) -> aot.Step:
        return "advance" if self.name == "decode" else "read"

    @functools.cached_property
    def _declared(self) -> Model:
        return Model(self.cfg)

    @functools.cached_property
    def _token_flops(self) -> float:
        return token_flops(self.cfg, self.context)

    @property
    def _options(self) -> dict[str, Any]:
        is_quantised = self.keep_quantised and self.cfg.quantized
        return {
            "batch": self.batch,
            "capacity": self.context,
            "tokens": self.chunk,
            "expert_format": self.cfg.expert_dtype if is_quantised else None,
            "entries": self.cache_dtype,
        }


def weight_bytes(declared: Model, weights: Model, mesh: AnyMesh) -> tuple[float, float]:
    """Bytes of dense weights that a device computes with, gathered over fsdp, and of its experts.

    MTP blocks and the embedding are left out: a step takes few rows of it.
    """
    dense = routed = 0.0
    specs = dict(params.leaves(declared))
    for name, leaf in params.leaves(weights):
        if name.startswith("mtp.") or name == "embed_VD":
            continue
        nbytes = memory.device_bytes(leaf)
        if specs[name].stored == "expert":
            routed += nbytes
        else:
            whole = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(leaf))
            dense += min(whole / mesh.shape["tensor"], nbytes * mesh.shape["fsdp"])
    return dense, routed


def token_flops(cfg: ModelConfig, context: int) -> float:
    """Operations of the forward pass of one token after `context` others."""
    attended = 0
    for kind in cfg.layers:
        entries = context // kind.ratio if kind.ratio else 0
        keys = min(entries, cfg.index_topk) if kind.attention == "csa" else entries
        attended += 4 * cfg.num_attention_heads * cfg.head_dim * (keys + cfg.sliding_window)
        if kind.attention == "csa":
            attended += 2 * cfg.index_n_heads * cfg.index_head_dim * entries
    return 2.0 * facts.report(cfg).active + attended


def cache_read(cfg: ModelConfig, context: int, cache_dtype: str | None) -> float:
    """Bytes of the cache that a step reads for one full sequence."""
    entry, key = facts.entry_bytes(cfg, cache_dtype or "bfloat16")
    total = 0.0
    for kind in cfg.layers:
        entries = context // kind.ratio if kind.ratio else 0
        if kind.attention == "csa":
            total += entries * key + min(entries, cfg.index_topk) * entry
        else:
            total += entries * entry
        total += 2 * cfg.sliding_window * cfg.head_dim
    return total
