"""A model whose arrays are identified by their dims, and those that a program moves."""

from tests import models
from v4jax import audit
from v4jax.audit import Collective

CFG = models.config(
    models.SLIDING,
    models.CSA,
    models.HCA,
    vocab_size=232,
    num_attention_heads=8,
    o_groups=8,
    index_n_heads=8,
    moe_intermediate_size=40,
)
# Each axis alone, and mixtures.
_SIZES: list[dict[str, int]] = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 8},
    {"tensor": 8},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 2, "expert": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"expert": 4, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 4},
]
MESHES = {", ".join(f"{axis} {size}" for axis, size in sizes.items()): sizes for sizes in _SIZES}
# Entries of the CSA and HCA pools for 1100 tokens, and for 256 in training.
ENTRIES = (288, 96, 160)


def large(text: str) -> dict[str, list[Collective]]:
    """Collectives that move pools, experts or logits, if any."""
    D, F = CFG.hidden_size, CFG.moe_intermediate_size
    moved: dict[str, list[Collective]] = {}
    for collective in audit.collectives(text):
        arrays = (*collective.operands, *collective.results)
        if any(collective.moves(entries) for entries in ENTRIES):
            moved.setdefault("pools", []).append(collective)
        # A single matrix may be the shared expert's.
        if any({D, F} <= set(x.dims) and x.bytes > 4 * D * F for x in arrays):
            moved.setdefault("experts", []).append(collective)
        # Arrays with the hidden dim are weights; so are matrices with half of it, under fsdp 2.
        parts = {CFG.vocab_size // ways for ways in (1, 2, 4, 8)}
        weight = any(D in x.dims or (len(x.dims) == 2 and D // 2 in x.dims) for x in arrays)
        if any(parts & set(x.dims) for x in arrays) and not weight:
            moved.setdefault("logits", []).append(collective)
    return moved
