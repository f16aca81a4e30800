"""The engine's programs for full-size Flash, 64 rows of a million tokens each, on absent devices.

All run in one process, because two processes cannot load libtpu at the same time.
"""

from typing import Any

import jax
import pytest
from jax.sharding import Mesh

import pallas_kernels
from pallas_kernels import targets
from v4jax import aot, audit, presets
from v4jax.engine.settings import PAGE
from v4jax.model import sharding
from v4jax.model.config import ModelConfig

pytestmark = [pytest.mark.full_compilation, pytest.mark.slow]
ROWS, CONTEXT = 64, 2**20


def compiled(cfg: ModelConfig, step: aot.Step, mesh: Mesh, **sizes: Any) -> jax.stages.Compiled:
    pallas_kernels.clear_choices()
    sizes |= {"batch": ROWS, "capacity": CONTEXT, "expert_format": "fp4"}
    return aot.lower(cfg, step, mesh, **sizes).compile()


def without_kernels(target: str) -> set[str]:
    """Operations of the last program that XLA's forms run, where the target might have a kernel."""
    chosen = [choice for choice in pallas_kernels.choices() if choice.target == target]
    assert chosen
    return {choice.operation for choice in chosen if choice.form == "xla"}


def check_pools(cfg: ModelConfig, program: jax.stages.Compiled, rows: int) -> None:
    """No pool is copied or moved."""
    text, pages = str(program.as_text()), rows * CONTEXT // PAGE + 1
    moved = audit.collectives(text)
    for ratio in {kind.ratio for kind in cfg.layers if kind.ratio}:
        assert f"[1,{pages},{PAGE // ratio}," in text or f"[20,{pages},{PAGE // ratio}," in text
        assert not audit.copies(text, pages, PAGE // ratio)
        assert not any(collective.moves(pages, PAGE // ratio) for collective in moved)


def check_step(cfg: ModelConfig, program: jax.stages.Compiled, rows: int) -> None:
    """Pools stay in place, and nothing else of the size of one is made."""
    check_pools(cfg, program, rows)
    assert targets.temporaries(program) < 64e6
    assert audit.moved(audit.collectives(str(program.as_text()))) < 210e6


@pytest.mark.parametrize(("pod", "experts", "drafts"), [("v6e:8x8", 64, 2), ("tpu7x:2x2x1", 8, 0)])
def test_a_pod_decodes_64_rows_of_a_million_tokens_in_place(
    pod: str, experts: int, drafts: int
) -> None:
    flash = presets.get("flash")
    mesh = aot.topology_mesh(pod, expert=experts)
    program = compiled(flash, "advance", mesh, drafts=drafts)
    check_step(flash, program, ROWS // experts)
    assert without_kernels("tpu") == {"rotary.rotate"}  # for fewer than 64 tokens of a device


def test_a_pod_reads_a_chunk_of_64_prompts_in_place() -> None:
    flash = presets.get("flash")
    program = compiled(flash, "read", aot.topology_mesh("v6e:8x8", expert=64), drafts=2)
    check_pools(flash, program, 1)
    assert targets.temporaries(program) < 4e9
    assert without_kernels("tpu") == {"rotary.rotate"}  # for the newest token, to draft from it


def test_eight_h200_decode_64_rows_of_a_million_tokens_in_place() -> None:
    flash = presets.get("flash")
    mesh = sharding.make_mesh(expert=8, devices=targets.devices("h200"))
    program = compiled(flash, "advance", mesh)
    check_step(flash, program, ROWS // 8)
    without = {"dense_attention.decode", "hyper.head", "hyper.post", "hyper.pre", "rotary.rotate"}
    assert without_kernels("gpu") == without
