"""The configuration: frozen, hashable and complete; rejects what the model does not define."""

import dataclasses
from typing import Literal, get_args

from v4jax.arguments import instance
from v4jax.model import config_ranges

AttentionKind = Literal["sliding", "csa", "hca"]
FfnKind = Literal["hash", "routed"]
ExpertDtype = Literal["fp4", "fp8"]


@dataclasses.dataclass(frozen=True, order=True)
class LayerKind:
    """The kind of one layer (report, section 2.3).

    Attributes:
      attention: sliding window alone, or with compressed entries: CSA (overlapping windows of
        `ratio` tokens and an indexer) or HCA (disjoint windows of `ratio` tokens, all visible).
      ratio: tokens per compressed entry; 0 for sliding.
      ffn: experts chosen by token id (hash) or by the learned router (routed).
    """

    attention: AttentionKind
    ratio: int
    ffn: FfnKind

    def __post_init__(self) -> None:
        if self.attention not in get_args(AttentionKind) or self.ffn not in get_args(FfnKind):
            raise ValueError(f"No such layer: attention '{self.attention}', ffn '{self.ffn}'.")
        config_ranges.check_all(vars(self))
        if (self.attention == "sliding") != (self.ratio == 0):
            raise ValueError(
                f"A {self.attention} layer cannot have ratio {self.ratio}: "
                "sliding layers need 0, compressed layers 1 or more."
            )

    @property
    def overlap(self) -> int:
        """Windows that one entry reads, whatever the ratio: 2 for CSA, 1 for HCA, 0 for sliding."""
        return {"sliding": 0, "csa": 2, "hca": 1}[self.attention]


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the compressed layers' rotary frequencies."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        config_ranges.check_all(vars(self))
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast {self.beta_fast} is below beta_slow {self.beta_slow}; YaRN needs the "
                "opposite."
            )


@dataclasses.dataclass(frozen=True)
class DSpark:
    """The drafter of the 0731 checkpoints: kept by conversion, never run."""

    block_size: int
    markov_rank: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    stages: int = 3

    def __post_init__(self) -> None:
        config_ranges.check_all(vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that the mathematics and the checkpoint's layout depend on, and nothing else.

    Names are those of the released `config.json`; `layers` replaces its per-layer lists.
    """

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    layers: tuple[LayerKind, ...]
    num_nextn_predict_layers: int = 0
    dspark: DSpark | None = None
    quantized: bool = False
    expert_dtype: ExpertDtype | None = None
    bos_token_id: int | None = 0
    eos_token_ids: tuple[int, ...] = (1,)
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        config_ranges.check_all(vars(self))
        config_ranges.check("num_hidden_layers", len(self.layers))
        self._check_tokens()
        self._check_divisions()
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds "
                f"n_routed_experts {self.n_routed_experts}."
            )

    def _check_tokens(self) -> None:
        if self.bos_token_id is not None:
            config_ranges.check_token("bos_token_id", self.bos_token_id, self.vocab_size)
        for token in self.eos_token_ids:
            config_ranges.check_token("eos_token_id", token, self.vocab_size)
        if self.dspark is None:
            return
        name, token = "dspark_noise_token_id", self.dspark.noise_token_id
        config_ranges.check_token(name, token, self.vocab_size)
        if outside := [i for i in self.dspark.target_layer_ids if i >= len(self.layers)]:
            raise ValueError(
                f"dspark_target_layer_ids has {outside}; the model has {len(self.layers)} layers."
            )

    def _check_divisions(self) -> None:
        for field in ("head_dim", "index_head_dim"):
            if not 0 < self.qk_rope_head_dim <= getattr(self, field):
                raise ValueError(
                    f"qk_rope_head_dim {self.qk_rope_head_dim} does not fit in "
                    f"{field} {getattr(self, field)}: RoPE rotates each head's last dims."
                )
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}; it must be even: RoPE rotates pairs."
            )
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"o_groups {self.o_groups}."
            )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def mtp_kind(self) -> LayerKind:
        """The kind of every MTP block: sliding attention, learned routing."""
        return LayerKind("sliding", 0, "routed")

    @property
    def chat_revision(self) -> str:
        """The revision of the chat format: checkpoints with a block drafter have the later one."""
        return "0731" if self.dspark else "april"


CONFIG = instance("a ModelConfig, such as v4jax.presets.get('flash')", ModelConfig)
