"""Full-size steps traced and lowered for TPU topologies, with abstract weights and without a TPU.

All run in one process, because two processes cannot load libtpu at the same time.
"""

import dataclasses
import resource
import time
from typing import Any

import jax
import pytest
from jax.sharding import Mesh

from pallas_kernels import targets
from v4jax import aot, audit, presets
from v4jax.adapters.lora import Lora
from v4jax.aot import Step
from v4jax.model import numerics, sharding
from v4jax.model.config import ModelConfig
from v4jax_train import aot as train_aot
from v4jax_train import optimizer, step, trainable
from v4jax_train.trainable import Full

pytestmark = pytest.mark.full_compilation
# `tiny`, made wide enough for every kernel.
WIDE = dataclasses.replace(
    presets.get("tiny"),
    hidden_size=256,
    moe_intermediate_size=256,
    q_lora_rank=256,
    o_lora_rank=128,
)


def four_devices(chip: targets.Target) -> Mesh:
    """Compile time grows with the number of devices, and a tpu7x:2x2x1 has eight."""
    return sharding.make_mesh(expert=4, devices=targets.devices(chip)[:4])


def lower_seconds(cfg: ModelConfig, step: Step) -> float:
    """CPU seconds: on a shared machine wall-clock time varies."""
    mesh = aot.topology_mesh("v5p:2x2x1")
    start = time.process_time()
    lowered = aot.lower(cfg, step, mesh, batch=8, capacity=8192)
    assert "stablehlo" in lowered.as_text()[:10_000]
    return time.process_time() - start


@pytest.mark.parametrize("step", ["decode", "prefill"])
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_the_full_model_lowers_for_v5p_in_30_seconds_and_4_gb(name: str, step: Step) -> None:
    assert lower_seconds(presets.get(name), step) < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 4e9


def test_43_layers_lower_in_the_time_of_5() -> None:
    flash = presets.get("flash")
    few = dataclasses.replace(flash, layers=flash.layers[:5])
    seconds = [lower_seconds(cfg, "decode") for cfg in (few, flash) if not jax.clear_caches()]
    assert seconds[1] < 1.5 * seconds[0]


@pytest.mark.slow
@pytest.mark.parametrize("chip", list(targets.TPU_TOPOLOGIES))
@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_steps_compile_for_every_chip(chip: targets.Target, step: Step) -> None:
    """Programs of a small model, with weights quantised as in the release."""
    mesh = four_devices(chip)
    lowered = aot.lower(
        WIDE, step, mesh, batch=mesh.size, capacity=512, tokens=32, expert_format="fp4"
    )
    program = lowered.compile()
    assert "experts_hidden" in str(program.as_text())
    analysis = program.memory_analysis()
    assert analysis is not None
    assert analysis.argument_size_in_bytes > 0


@pytest.mark.slow
def test_the_tiny_model_compiles_where_experts_have_no_kernel() -> None:
    mesh = aot.topology_mesh("v6e:2x2")
    tiny = presets.get("tiny")
    lowered = aot.lower(
        tiny, "prefill", mesh, batch=8, capacity=1024, tokens=64, expert_format="fp4"
    )
    assert "experts_hidden" not in str(lowered.compile().as_text())


def lowered_training(cfg: ModelConfig, mesh: Any, *, adapts: bool, **sizes: Any) -> Any:
    """A step of LoRA on every matrix over FP8 and FP4, or of Muon with all pre-training losses."""
    what = Lora(targets="all") if adapts else Full(dtype="bfloat16")
    mtp = 0.3 if cfg.num_nextn_predict_layers else 0.0
    losses: dict[str, Any] = (
        {} if adapts else {"mtp_weight": mtp, "balance_weight": 1e-4, "bias_speed": 1e-3}
    )
    settings = step.Settings(cfg=cfg, numerics=numerics.OFFICIAL, what=what, **losses)
    declared = trainable.declare(cfg, what)
    rule = optimizer.make(declared, cfg, 1e-4, rule="adamw" if adapts else "muon")
    # Optax mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        return train_aot.lower(settings, rule, mesh, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("adapts", [True, False], ids=["lora", "muon"])
def test_full_size_training_lowers_for_a_pod(adapts: bool) -> None:
    mesh = aot.topology_mesh("v5p:4x4x4")
    flash = presets.get("flash")
    lowered = lowered_training(flash, mesh, adapts=adapts, batch=64, seq_len=4096)
    assert "stablehlo" in lowered.as_text()[:10_000]


@pytest.mark.slow
@pytest.mark.parametrize("adapts", [True, False], ids=["lora", "muon"])
@pytest.mark.parametrize("chip", list(targets.TPU_TOPOLOGIES))
def test_training_compiles_for_every_chip(chip: targets.Target, adapts: bool) -> None:
    """One layer: sparse attention with an adapter, compressed attention with Muon."""
    layers = WIDE.layers[1:2] if adapts else WIDE.layers[2:3]
    cfg = dataclasses.replace(WIDE, layers=layers, num_nextn_predict_layers=0)
    mesh = four_devices(chip)
    batch = mesh.size
    program = lowered_training(cfg, mesh, adapts=adapts, batch=batch, seq_len=128).compile()
    assert "all-gather" in str(program.as_text())
    assert "experts_weight_gradient" in str(program.as_text())
    assert targets.temporaries(program) > 0


def lowered_for_v6e(cfg: ModelConfig, step: Step, **sizes: Any) -> jax.stages.Lowered:
    """A step lowered for one chip, with weights in the release's formats."""
    mesh = sharding.make_mesh(devices=targets.devices("v6e")[:1])
    return aot.lower(cfg, step, mesh, batch=1, expert_format="fp4", **sizes)


@pytest.mark.slow
def test_a_step_at_a_million_tokens_of_context_needs_few_temporaries() -> None:
    """Flash's first 7 layers: every kind, the last four in a scan.

    No scores, no copy of a pool, and no weight dequantised or copied out of its stack.
    """
    flash = presets.get("flash")
    few = dataclasses.replace(flash, layers=flash.layers[:7])
    program = lowered_for_v6e(few, "decode", capacity=2**20).compile()
    assert "indexer_topk_select" in str(program.as_text())
    assert targets.temporaries(program) < 64e6


@pytest.mark.slow
def test_64_chips_at_a_million_tokens_move_only_activations() -> None:
    """With the same layers. For all 43, `benchmarks.pods` reports less than 12 MB per step."""
    flash = presets.get("flash")
    few = dataclasses.replace(flash, layers=flash.layers[:7])
    mesh = aot.topology_mesh("v6e:8x8", expert=8, tensor=8)
    program = aot.lower(few, "decode", mesh, batch=8, capacity=2**20, expert_format="fp4").compile()
    collectives = audit.collectives(str(program.as_text()))
    assert max(collective.times for collective in collectives) > 1, "layers are not scanned"
    assert audit.moved(collectives) < 12e6 * 7 / 43
    assert targets.temporaries(program) < 64e6


@pytest.mark.slow
def test_a_prompt_needs_less_than_a_third_of_the_references_memory() -> None:
    """A Flash-sized CSA layer over 8192 tokens, against only the logits of plain attention."""
    flash, tokens = presets.get("flash"), 8192
    kind = next(layer for layer in flash.layers if layer.attention == "csa")
    cfg = dataclasses.replace(flash, layers=(kind,), num_nextn_predict_layers=0)
    program = lowered_for_v6e(cfg, "prefill", capacity=tokens, tokens=tokens).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    weights = analysis.argument_size_in_bytes
    # Plain attention has a float32 logit per query, head and key.
    keys = tokens // kind.ratio + flash.sliding_window + tokens
    logits = 4 * tokens * flash.num_attention_heads * keys
    assert targets.temporaries(program) < logits / 3
    assert weights + targets.temporaries(program) < (weights + logits) / 3
