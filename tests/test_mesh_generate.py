"""Generation on a mesh, for which a user only loads onto it, and its programs for TPUs."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import v4jax
from pallas_kernels import targets
from tests import checkpoints
from tests.test_aot import WIDE
from v4jax import aot, presets
from v4jax.__main__ import main
from v4jax.aot import Step
from v4jax.checkpoints import random_release
from v4jax.engine import programs
from v4jax.language_model import LanguageModel
from v4jax.model import sharding

# One layer of each kind.
CFG = checkpoints.tiny(layers=presets.get("tiny").layers[:3], num_nextn_predict_layers=0)
PROMPT = np.random.default_rng(0).integers(0, CFG.vocab_size, 9).tolist()
OPTIONS: dict[str, Any] = {"max_tokens": 6, "seed": 3}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mesh") / "model"
    random_release.make_checkpoint(path, CFG, 0)
    return path


def load(directory: Path, mesh: Mesh | None = None) -> LanguageModel:
    return v4jax.load(directory, dtype="float32", numerics="hf", mesh=mesh)


@pytest.fixture(scope="module")
def alone(directory: Path) -> LanguageModel:
    return load(directory)


# Alternatives (`top_logprobs`) need programs of their own.
@pytest.mark.parametrize(("text", "top"), [("tensor=8", 0), ("fsdp=2,expert=2,tensor=2", 2)])
def test_a_model_on_a_mesh_is_used_like_any_other(
    text: str, top: int, directory: Path, alone: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = load(directory, sharding.read_mesh(text))
    ours, theirs = (
        model.generate(PROMPT, **OPTIONS, top_logprobs=top) for model in (spread, alone)
    )
    assert ours.tokens == theirs.tokens
    ids = [[[id for id, _ in best] for best in output.top_logprobs] for output in (ours, theirs)]
    assert ids[0] == ids[1]
    assert {len(best) for best in ids[0]} == {top}
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    pieces = spread.stream(PROMPT, max_tokens=6, seed=3)
    assert "".join(pieces) == theirs.text
    logits_BTV, expected_BTV = (model.logits([PROMPT] * 3) for model in (spread, alone))
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-5 * np.abs(expected_BTV).max())
    words = ["--max-tokens", "6", "--seed", "3", "--dtype", "float32", "--numerics", "hf"]
    prompt = spread.tokenizer.decode(PROMPT) if spread.tokenizer else ""
    for more in ([], ["--mesh", text]):
        assert main(["generate", str(directory), "-p", prompt, *words, *more]) == 0
    without, on_mesh = capsys.readouterr().out.splitlines()
    assert without == on_mesh


def test_rows_that_the_mesh_does_not_divide_are_generated_as_if_alone(
    directory: Path, alone: LanguageModel
) -> None:
    spread = load(directory, sharding.make_mesh(data=4, tensor=2))
    prompts: Any = [PROMPT, PROMPT[:5], PROMPT[2:]]
    outputs: Any = [model.generate(prompts, **OPTIONS) for model in (spread, alone)]
    assert [out.tokens for out in outputs[0]] == [out.tokens for out in outputs[1]]


@pytest.mark.parametrize("words", ["tensor=3", "model=8", "tensor"])
def test_an_invalid_mesh_is_reported_in_one_line(
    words: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(directory), "-p", "x", "--mesh", words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "there are 8" in line or "multiply to 8, the number of devices" in line


def placements(tree: Any) -> list[tuple[Any, ...]]:
    """Each array's shape, dtype and which part of it is on which device."""
    where = lambda x: getattr(x, "sharding", None)
    spread = lambda x: None if where(x) is None else x.sharding.devices_indices_map(x.shape)
    return [(x.shape, x.dtype, spread(x)) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_ahead_of_time_arguments_are_those_of_generation(
    sizes: dict[str, int], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = sharding.make_mesh(**sizes)
    model = load(directory, mesh)
    advance, calls = programs.advance, []

    def recorded(*args: Any, **static: Any) -> Any:
        calls.append(placements(args))
        return advance(*args, **static)

    with monkeypatch.context() as patch:
        patch.setattr(programs, "advance", recorded)
        model.generate(PROMPT, **OPTIONS)
    groups = sharding.row_groups(mesh)
    arguments = aot.arguments(CFG, "advance", mesh, batch=groups, capacity=128, dtype=jnp.float32)
    assert len(calls) > 1
    for args in calls:
        for ours, theirs in zip(args, placements(arguments), strict=True):
            assert ours[:2] == theirs[:2]
            # Where rows are not split, those of the host are passed as they are.
            on_host = ours[2] is None or len(ours[2]) == 1
            assert ours[2] == theirs[2] or (on_host and (groups == 1 or ours[0] == ()))


@pytest.mark.full_compilation
@pytest.mark.slow
@pytest.mark.parametrize("step", ["prefill", "advance"])
def test_generation_compiles_for_tpus(step: Step) -> None:
    """Four chips of v6e, one prompt, the weights in the release's formats."""
    mesh = sharding.make_mesh(tensor=4, devices=targets.devices("v6e"))
    lowered = aot.lower(WIDE, step, mesh, batch=1, capacity=512, tokens=64, expert_format="fp4")
    program = lowered.compile()
    assert "num_partitions=4" in str(program.as_text())
    assert "experts_hidden" in str(program.as_text())
