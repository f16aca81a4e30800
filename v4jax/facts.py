"""Figures of a configuration: layers, parameters, bytes, cache size and devices.

Nothing is allocated: everything is computed from the declarations.
"""

import collections
import dataclasses
import math

from pallas_kernels.byte_rows import Fp4Codec, Fp8Codec
from v4jax import presets
from v4jax.arguments import checked, integer
from v4jax.checkpoints.formats import QUANTISED
from v4jax.checkpoints.safetensors_file import DTYPES
from v4jax.model import params
from v4jax.model.block import Stack
from v4jax.model.cache import SPARE
from v4jax.model.config import CONFIG, ModelConfig
from v4jax.model.hyper import HyperHead
from v4jax.model.params import ParamSpec
from v4jax.model.segments import mtp_segment
from v4jax.model.transformer import Model

# Memory per device in GiB: usable memory by the TPU compiler for v5p and v6e, else nominal.
DEVICES = {"v5p chip": 95.74, "v6e chip": 31.25, "tpu7x chip": 192.0, "H100": 80.0, "H200": 141.0}
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures of a configuration.

    Attributes:
      variant: name of the preset with this configuration, or 'custom'.
      revision: revision of the chat format, 'april' or '0731'.
      layers: number of layers of each kind.
      total: parameters of the backbone with embedding and head.
      mtp: parameters of the drafter.
      active: parameters of the backbone used per token, without the embedding.
      bytes_by_dtype: bytes of the release's tensors, including MTP.
      cache_bytes: bytes per token, by cache format.
      state_bytes: bytes per sequence of any length, in bfloat16 (compressor tails in float32).
      devices: number of devices of each kind that the release's bytes need.
    """

    variant: str
    revision: str
    layers: dict[str, int]
    total: int
    mtp: int
    active: int
    bytes_by_dtype: dict[str, int]
    cache_bytes: dict[str, float]
    state_bytes: int
    devices: dict[str, int]


@checked(cfg=CONFIG)
def report(cfg: ModelConfig) -> Report:
    """All figures that `v4jax inspect` prints about a configuration."""
    kinds = collections.Counter(f"{layer.attention} + {layer.ffn}" for layer in cfg.layers)
    sizes = release_bytes(cfg)
    return Report(
        variant=_variant(cfg),
        revision=cfg.chat_revision,
        layers=dict(kinds),
        total=params.count(Model(dataclasses.replace(cfg, num_nextn_predict_layers=0))),
        mtp=sum(spec.size for spec in _drafter(cfg) if spec.stored != "i64"),
        active=_active(cfg),
        bytes_by_dtype=sizes,
        cache_bytes=cache_bytes(cfg),
        state_bytes=_state_bytes(cfg),
        devices=devices(sum(sizes.values())),
    )


@checked(nbytes=integer(0, 2**63 - 1))
def devices(nbytes: int) -> dict[str, int]:
    """The number of devices of each kind that `nbytes` need."""
    return {name: math.ceil(nbytes / (gib * GIB)) for name, gib in DEVICES.items()}


def _variant(cfg: ModelConfig) -> str:
    for name in presets.names():
        if presets.get(name) == cfg:
            return name
    return "custom"


def _drafter(cfg: ModelConfig) -> list[ParamSpec]:
    """Weights of the MTP blocks or of the DSpark drafter, which v4jax does not run."""
    if cfg.dspark is None:
        return [spec for name, spec in params.leaves(Model(cfg)) if name.startswith("mtp.")]
    D, spark = cfg.hidden_size, cfg.dspark
    stage = [spec for _, spec in params.leaves(Stack(cfg, mtp_segment(cfg)))]
    spec_of = lambda stored, *shape: ParamSpec(shape, (None,) * len(shape), stored)
    targets = len(spark.target_layer_ids)
    head = [spec for _, spec in params.leaves(HyperHead(cfg, params.Declare()))]
    markov = [spec_of("bf16", cfg.vocab_size, spark.markov_rank)] * 2
    confidence = spec_of("bf16", 1, D + spark.markov_rank)
    main = [spec_of("fp8", D, targets * D), spec_of("bf16", D), spec_of("bf16", D)]
    return stage * spark.stages + head + markov + [confidence, *main]


def _active(cfg: ModelConfig) -> int:
    """Parameters of the backbone and head that one token uses."""
    inactive = 1 - cfg.num_experts_per_tok / cfg.n_routed_experts
    total = 0
    for name, spec in params.leaves(Model(cfg)):
        if name.startswith("mtp.") or name == "embed_VD" or spec.stored == "i64":
            continue
        total += spec.size - int(spec.size * inactive) if spec.stored == "expert" else spec.size
    return total


@checked(cfg=CONFIG)
def release_bytes(cfg: ModelConfig) -> dict[str, int]:
    """Bytes of the release's tensors by dtype; FP4 codes are stored as I8, two per byte."""
    sizes: collections.Counter[str] = collections.Counter()
    backbone = Model(dataclasses.replace(cfg, num_nextn_predict_layers=0))
    for spec in [*(spec for _, spec in params.leaves(backbone)), *_drafter(cfg)]:
        for dtype, elements in _stored(spec, cfg):
            sizes[dtype] += elements * DTYPES[dtype].itemsize
    return dict(sorted(sizes.items()))


def _stored(spec: ParamSpec, cfg: ModelConfig) -> list[tuple[str, int]]:
    match cfg.expert_dtype if spec.stored == "expert" else spec.stored:
        case "fp8" | "fp4" as stored if cfg.quantized:
            form = QUANTISED[stored]
            scales = math.prod(form.scales_shape(spec.shape))
            return [(form.dtypes[0], spec.size // form.packed), ("F8_E8M0", scales)]
        case "f32":
            return [("F32", spec.size)]
        case "i64":
            return [("I64", spec.size)]
    return [("BF16", spec.size)]


@checked(cfg=CONFIG)
def cache_bytes(cfg: ModelConfig) -> dict[str, float]:
    """Bytes per token of the compressed pools, which grow with the text.

    'bfloat16' and 'float32' are the layouts of v4jax with these dtypes, and 'fp8' that of the
    engine's `cache_dtype`; 'fp8 + fp4' is DeepSeek's deployment layout: rotary dims in BF16, the
    others in FP8 with a scale per 64, index keys in FP4 with a scale per 32.
    """
    rope, index = cfg.qk_rope_head_dim, cfg.index_head_dim
    plain = cfg.head_dim - rope
    packed_entry = plain + 2 * rope + math.ceil(plain / 64) + 1
    packed_index = index // 2 + math.ceil(index / 32)
    sizes = {
        "bfloat16": entry_bytes(cfg, "bfloat16"),
        "float32": entry_bytes(cfg, "float32"),
        "fp8": entry_bytes(cfg, "fp8"),
        "fp8 + fp4": (packed_entry, packed_index),
    }
    totals = dict.fromkeys(sizes, 0.0)
    for layer in cfg.layers:
        for form, (entry, key) in sizes.items():
            nbytes = entry + (key if layer.attention == "csa" else 0)
            totals[form] += nbytes / layer.ratio if layer.ratio else 0
    return totals


def entry_bytes(cfg: ModelConfig, form: str) -> tuple[int, int]:
    """Bytes of a compressed entry and of an indexer's key in 'fp8', 'bfloat16' or 'float32'."""
    if form == "fp8":
        entry = Fp8Codec(cfg.head_dim, cfg.qk_rope_head_dim)
        return entry.width, Fp4Codec(cfg.index_head_dim).width
    itemsize = 4 if form == "float32" else 2
    return itemsize * cfg.head_dim, itemsize * cfg.index_head_dim


def _state_bytes(cfg: ModelConfig) -> int:
    """Bytes of a sequence's rings, with their spare rows."""
    total = 0
    for layer in cfg.layers:
        total += 2 * (cfg.sliding_window + SPARE) * cfg.head_dim
        width = cfg.head_dim + (cfg.index_head_dim if layer.attention == "csa" else 0)
        rows = layer.overlap * layer.ratio + SPARE
        total += 4 * rows * 2 * layer.overlap * width if layer.ratio else 0
    return total
