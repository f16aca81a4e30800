"""What training changed in a model: an adapter, or weights that replace the old ones.

Read from the directory of a run or an adapter; attached to a model in memory, or applied to one
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
from v4jax.adapters.lora import Adapter
from v4jax.adapters.lora_settings import Lora
from v4jax.checkpoints import hub, native, remote, safetensors_directory, unfinished
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.formats import FP4
from v4jax.checkpoints.open_checkpoint import open_checkpoint
from v4jax.model import params, sharding
from v4jax.model.config import ModelConfig
from v4jax.model.params import ParamSpec
from v4jax.model.transformer import Model


class Adapted(NamedTuple):
    """An adapter: its settings, and its factors as NumPy arrays."""

    settings: Lora
    factors: Adapter


class Replaced(NamedTuple):
    """Weights by dotted name, as NumPy arrays; `fp4_experts`: experts' weights round to FP4."""

    weights: dict[str, np.ndarray]
    fp4_experts: bool


Update = Adapted | Replaced


def resolve(path_or_id: str | Path) -> Path:
    """The directory of a run or an adapter; an adapter that is not local comes from the Hub."""
    remote.refuse(path_or_id, "an adapter")
    return hub.resolve(path_or_id, allow_patterns=[peft.CONFIG, peft.TENSORS])


def read(path: Path, cfg: ModelConfig, *, best: bool = False) -> Update:
    """The update of a run's newest state or of a PEFT adapter.

    Args:
      path: the directory of the run or adapter.
      cfg: configuration of the model to update.
      best: use a run's best state instead of its newest.

    Raises:
      CheckpointError: the directory is neither, is damaged, or is for another model.
    """
    unfinished.refuse_unfinished(path)
    if peft.is_adapter(path):
        if best:
            raise CheckpointError(f"{path}: is an adapter; only a run has a best state.")
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
        _check(path, trained, lora.declare(cfg, run.adapter), complete=True)
        return Adapted(run.adapter, trained)
    _check(path, trained, dict(params.leaves(Model(cfg))), complete=False)
    return Replaced(trained, run.fp4_experts)


def _check(path: Path, values: dict[str, Any], declared: dict[str, Any], *, complete: bool) -> None:
    """Reject values that do not match the model; `complete`: all declared must be present."""
    shape = lambda x: {k: tuple(v.shape) for k, v in x.items()} if isinstance(x, dict) else x.shape
    names = values.keys() | declared if complete else values.keys()
    for name in sorted(names):
        stored = shape(values[name]) if name in values else "missing"
        expected = shape(declared[name]) if name in declared else "missing"
        if name not in values or name not in declared or stored != expected:
            raise CheckpointError(
                f"{path}: is for another model: '{name}' is {stored} here and {expected} in this"
                " model."
            )


def _check_finite(run: runs.Run, trained: dict[str, Any]) -> None:
    for path, value in jax.tree.leaves_with_path(trained):
        if not np.isfinite(value).all():
            name = ".".join(str(key.key) for key in path)
            raise CheckpointError(
                f"{run.state}: '{name}' has values that are not finite. The state is damaged, or "
                "the training went wrong; use another state."
            )


def identity(path: Path, *, best: bool = False) -> str:
    """A digest that changes with the result of `read`, judged by the files' sizes and times."""
    if peft.is_adapter(path):
        files = [path / peft.CONFIG, path / peft.TENSORS]
    else:
        run = runs.open_run(path, best=best)
        files = [run.path / runs.RECIPE, *sorted(f for f in run.state.rglob("*") if f.is_file())]
    stats = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def attach(model: Model, cfg: ModelConfig, update: Update, dtype: Any) -> Model:
    """The model with the update, which replaces an adapter it may have.

    Args:
      model: the model; the result shares its unchanged weights.
      cfg: the model's configuration.
      update: the update from `read`.
      dtype: dtype of replaced weights that need not be float32.
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
    """The arrays on the model's devices."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.device_put(tree, sharding.shardings(declared, mesh, tree))


def changed(update: Update, leaf: str, at: tuple[int, ...], base: np.ndarray) -> np.ndarray | None:
    """A tensor after the update, float32; None if it is unchanged.

    Args:
      update: the update from `read`.
      leaf: dotted name of the weight that contains the tensor.
      at: index of the tensor in the weight's stack.
      base: the tensor before the update, float32.
    """
    if isinstance(update, Adapted):
        a, b = (np.asarray(update.factors[leaf][part][at], np.float32) for part in "ab")
        delta = np.float32(update.settings.scale_of(leaf)) * (b @ a)
        return base + delta if delta.any() else None
    new = update.weights[leaf][at]
    if update.fp4_experts and ".experts." in leaf:
        new = np.asarray(new, np.float32)
        new = FP4.decode(*FP4.encode(new))
    # Compare in the run's dtype, to which the base was rounded at the start.
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
      target: directory to create.
      model: path or Hub id of the model; None: the one named by the run.
      best: use the run's best state instead of its newest.

    Raises:
      CheckpointError: the run has no adapter or a damaged one, its model is not available, or the
        target exists or is inside one of them.
    """
    run, target = (Path(os.path.abspath(os.path.expanduser(path))) for path in (run, target))
    unfinished.check_target(target)
    opened = runs.open_run(run, best=best)
    if opened.adapter is None:
        raise CheckpointError(
            f"{run}: trained the weights in full, not an adapter; 'v4jax merge' writes them."
        )
    name = model or opened.model
    try:
        small_files = [safetensors_directory.CONFIG, native.MANIFEST]
        base = hub.resolve(name, allow_patterns=small_files)
        cfg = open_checkpoint(base).config
    except CheckpointError as error:
        raise CheckpointError(f"{error} That is the run's model; give --model.") from error
    unfinished.check_target(target, run, base)
    update = read(run, cfg, best=best)
    assert isinstance(update, Adapted)
    peft.export(target, cfg, *update, base=name)
