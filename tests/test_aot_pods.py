"""Full-size programs on slices of TPUs: they fit, and nothing large moves.

All run in one process, because two processes cannot load libtpu at the same time.
"""

from typing import Any

import jax
import pytest

import pallas_kernels
from pallas_kernels import targets
from v4jax import aot, audit, presets
from v4jax.adapters.lora import Lora
from v4jax.model.numerics import OFFICIAL
from v4jax_train import aot as train_aot
from v4jax_train import optimizer, step, trainable

pytestmark = [pytest.mark.full_compilation, pytest.mark.slow]
GIB = 2**30
FLASH = presets.get("flash")


def peak(program: jax.stages.Compiled) -> float:
    analysis: Any = program.memory_analysis()
    return analysis.peak_memory_in_bytes / GIB


def without_kernels() -> set[str]:
    chosen = [choice for choice in pallas_kernels.choices() if choice.target == "tpu"]
    return {choice.operation for choice in chosen if choice.form == "xla"}


def test_eight_chips_decode_eight_rows_of_a_million_tokens() -> None:
    mesh = aot.topology_mesh("v6e:2x4", expert=8)
    sizes = {"batch": 8, "capacity": 2**20, "expert_format": "fp4", "entries": "fp8"}
    program = aot.lower(FLASH, "advance", mesh, **sizes).compile()
    assert peak(program) < 30
    assert targets.temporaries(program) < 64e6
    assert audit.moved(audit.collectives(str(program.as_text()))) < 12e6


def test_128_chips_train_an_adapter_on_a_row_of_4096_tokens_each() -> None:
    """Compiled with little optimisation, as by `v4jax plan`: it takes less time."""
    pallas_kernels.clear_choices()
    mesh = aot.topology_mesh("v5p:4x4x8", fsdp=128)
    settings = step.Settings(cfg=FLASH, numerics=OFFICIAL, what=Lora("attn"))
    rule = optimizer.make(trainable.declare(FLASH, settings.what), FLASH, 1e-4, rule="adamw")
    # Optax mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        lowered = train_aot.lower(settings, rule, mesh, batch=128, seq_len=4096)
    options: Any = {"exec_time_optimization_effort": -1.0}
    program = lowered.compile(options)
    assert peak(program) < 16
    moved = audit.collectives(str(program.as_text()))
    D, F, entries = FLASH.hidden_size, FLASH.moe_intermediate_size, (1024, 32)
    experts = FLASH.n_routed_experts
    assert not [one for one in moved if one.moves(experts, D, F) or one.moves(experts, D, F // 2)]
    assert not [one for one in moved if any(one.moves(size, FLASH.head_dim) for size in entries)]
    assert without_kernels() == {"rotary.rotate"}
