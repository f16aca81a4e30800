"""What training changed of a model: an adapter, or weights in place of the old ones.

Read from a run's directory or from an adapter's; attached to a model in memory, or asked for one
tensor at a time by `merge`.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pallas_kernels import quantize
from pallas_kernels.grouped_matmul import LoraWeight
from v4jax import arguments
from v4jax.adapters import lora, peft, runs
from v4jax.adapters.lora import Adapter, Lora
from v4jax.checkpoints import hub, native, safetensors_directory, unfinished
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.formats import FP4
from v4jax.checkpoints.open_checkpoint import open_checkpoint
from v4jax.model import params, sharding
from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec
from v4jax.model.transformer import Model


class Adapted(NamedTuple):
    """An adapter: what it was made with, and its factors as NumPy arrays."""

    settings: Lora
    factors: Adapter


class Replaced(NamedTuple):
    """Weights by dotted name, as NumPy arrays; `fp4_experts`: the experts' are rounded to FP4."""

    weights: dict[str, np.ndarray]
    fp4_experts: bool


Update = Adapted | Replaced


def resolve(path_or_id: str | Path) -> Path:
    """The directory of a run or an adapter; an adapter that is not here comes from the Hub."""
    return hub.resolve(path_or_id, allow_patterns=[peft.CONFIG, peft.TENSORS])


def read(path: Path, cfg: ModelConfig, *, best: bool = False) -> Update:
    """What a run's newest state or a PEFT adapter changes.

    Args:
      path: the directory of either.
      cfg: of the model that it is for.
      best: of a run, the state that evaluations found best.

    Raises:
      CheckpointError: it is neither, is damaged, or is of another model.
    """
    unfinished.refuse_unfinished(path)
    if peft.is_adapter(path):
        if best:
            raise CheckpointError(f"{path}: is an adapter, of which there is one state only.")
        return Adapted(*peft.load(path, cfg))
    if not runs.is_run(path):
        raise CheckpointError(
            f"{path}: is neither an adapter ({peft.CONFIG}) nor the directory of a run "
            f"({runs.RECIPE})."
        )
    run = runs.open_run(path, best=best)
    trained = runs.trained(run)
    _check_finite(run, trained)
    if run.adapter is not None:
        _check(path, trained, lora.declare(cfg, run.adapter), whole=True)
        return Adapted(run.adapter, trained)
    _check(path, trained, dict(params.leaves(Model(cfg))), whole=False)
    return Replaced(trained, run.fp4_experts)


def _check(path: Path, found: dict[str, Any], declared: dict[str, Any], *, whole: bool) -> None:
    """Refuse what is not of this model; with `whole`, all that is declared must be there."""
    shape = lambda x: {k: tuple(v.shape) for k, v in x.items()} if isinstance(x, dict) else x.shape
    names = found.keys() | declared if whole else found.keys()
    for name in sorted(names):
        if name not in found or name not in declared or shape(found[name]) != shape(declared[name]):
            here = shape(found[name]) if name in found else "missing"
            there = shape(declared[name]) if name in declared else "no weight of it"
            raise CheckpointError(
                f"{path}: is of another model: '{name}' is {here}, and in this model {there}."
            )


def _check_finite(run: runs.Run, trained: dict[str, Any]) -> None:
    for path, value in jax.tree.leaves_with_path(trained):
        if not np.isfinite(value).all():
            name = ".".join(str(key.key) for key in path)
            raise CheckpointError(
                f"{run.state}: '{name}' has values that are no finite numbers. The state is "
                "damaged, or the training went wrong; take another state."
            )


def identity(path: Path, *, best: bool = False) -> str:
    """A digest that changes when what `read` gives does, as far as files tell."""
    if peft.is_adapter(path):
        files = [path / peft.CONFIG, path / peft.TENSORS]
    else:
        run = runs.open_run(path, best=best)
        files = [run.path / runs.RECIPE, *sorted(f for f in run.state.rglob("*") if f.is_file())]
    stats = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def attach(model: Model, cfg: ModelConfig, update: Update, dtype: Any) -> Model:
    """The model with the update in place of the adapter that it may have.

    Args:
      model: shares all that is not changed with the result.
      cfg: its configuration.
      update: see `read`.
      dtype: of weights that replace old ones and need not be float32.
    """
    base = detach(model, cfg)
    mesh = sharding.mesh_of(base)
    if isinstance(update, Adapted):
        declared = lora.declare(cfg, update.settings)
        factors = _placed(update.factors, declared, mesh)
        return lora.attach(base, cfg, update.settings, factors)

    def replaced(name: str, spec: ParamSpec, weight: Any) -> Any:
        if name not in update.weights:
            return weight
        new = jnp.asarray(update.weights[name], params.leaf_struct(spec, dtype).dtype)
        if update.fp4_experts and spec.stored == "expert":
            new = quantize.fake_quant_fp4(new, block=32)
        return _placed({name: new}, {name: spec}, mesh)[name]

    return params.map_leaves(replaced, Model(cfg), base)


def detach(model: Model, cfg: ModelConfig) -> Model:
    """The model without its adapter."""
    base = lambda _name, _spec, weight: weight.base if isinstance(weight, LoraWeight) else weight
    return params.map_leaves(base, Model(cfg), model)


def _placed(tree: Any, declared: Any, mesh: Mesh | None) -> Any:
    """The arrays where the model's are."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.device_put(tree, sharding.shardings(declared, mesh, tree))


def changed(update: Update, leaf: str, at: tuple[int, ...], base: np.ndarray) -> np.ndarray | None:
    """A tensor after the update, float32; None where it is as before.

    Args:
      update: see `read`.
      leaf: dotted name of the weight that the tensor is a part of.
      at: its place in the weight's stack.
      base: the tensor before, float32.
    """
    if isinstance(update, Adapted):
        a, b = (np.asarray(update.factors[leaf][part][at], np.float32) for part in "ab")
        delta = np.float32(update.settings.scale_of(leaf)) * (b @ a)
        return base + delta if delta.any() else None
    new = update.weights[leaf][at]
    if update.fp4_experts and ".experts." in leaf:
        new = np.asarray(new, np.float32)
        new = FP4.decode(*FP4.encode(new))
    # In the run's own dtype, to which the base was rounded at its beginning.
    return None if np.array_equal(new, base.astype(new.dtype)) else np.asarray(new, np.float32)


def touches(update: Update, leaf: str) -> bool:
    """Whether the update may change a weight."""
    return leaf in (update.factors if isinstance(update, Adapted) else update.weights)


@arguments.checked(
    run=arguments.DIRECTORY,
    target=arguments.DIRECTORY,
    model=arguments.optional(arguments.TEXT),
    best=arguments.FLAG,
)
def export_adapter(
    run: Path, target: Path, *, model: str | None = None, best: bool = False
) -> None:
    """Write a run's adapter for PEFT.

    Args:
      run: the run's directory.
      target: a directory to be made.
      model: path or Hub id of the model; the one that the run names, by default.
      best: the state that evaluations found best, not the newest.

    Raises:
      CheckpointError: the run has no adapter or a damaged one, its model is not to be had, or the
        target exists or lies in one of them.
    """
    run, target = (Path(os.path.abspath(os.path.expanduser(path))) for path in (run, target))
    unfinished.check_target(target)
    opened = runs.open_run(run, best=best)
    if opened.adapter is None:
        raise CheckpointError(
            f"{run}: trained the weights themselves, not an adapter; 'v4jax merge' writes them."
        )
    name = model or opened.model
    try:
        small = [safetensors_directory.CONFIG, native.MANIFEST]
        base = hub.resolve(name, allow_patterns=small)
        cfg = open_checkpoint(base).config
    except CheckpointError as error:
        raise CheckpointError(f"{error} That is the run's model; give --model.") from error
    unfinished.check_target(target, run, base)
    update = read(run, cfg, best=best)
    assert isinstance(update, Adapted)
    peft.export(target, cfg, *update, base=name)
