"""From a recipe to what a run needs: weights taken apart, an optimiser, batches, devices."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import v4jax
from v4jax import facts
from v4jax.checkpoints import hub
from v4jax.checkpoints.disk import Progress
from v4jax.checkpoints.open_checkpoint import open_checkpoint
from v4jax.model import context, numerics, sharding
from v4jax.model.config import ModelConfig
from v4jax.text.tokenizer import Tokenizer

from . import optimizer, processes, step, trainable
from .data import dataset, documents
from .data.dataset import Packs
from .data.documents import Documents
from .data.rendering import Renderer
from .recipe import Recipe, weighted
from .trainable import Parts


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that is ready to begin.

    Attributes:
      settings: what its step is compiled with.
      frozen: the part of the model that no step changes.
      rule: the optimiser.
      rate: the learning rate of a step.
      tokenizer: the model's.
      mesh: of all devices; None where there is one.
    """

    settings: step.Settings
    frozen: Any
    rule: optax.GradientTransformation
    rate: Callable[[Any], Any]
    tokenizer: Tokenizer
    mesh: Mesh | None


def text_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of the recipe's model.

    Raises:
      ValueError: there is no model or it has no tokenizer.
    """
    if not recipe.model.path:
        raise ValueError("No model is named; give --model, or model.path in the recipe.")
    directory = hub.resolve(recipe.model.path, allow_patterns=["tokenizer.json"])
    return Tokenizer.load(directory)


def read_data(recipe: Recipe, tokenizer: Tokenizer, files: tuple[str, ...]) -> list[Documents]:
    """The documents of each file, without the weights after their names."""
    renderer, data = Renderer(tokenizer, recipe.data.render()), recipe.data
    return [
        documents.load(name, renderer, skip_wrong=data.skip_wrong, settings=data.read())
        for name, _ in map(weighted, files)
    ]


def packs(recipe: Recipe, found: list[Documents]) -> list[Packs]:
    """What is trained, packed; no device is used.

    Raises:
      ValueError: no data, or documents that cannot be packed.
    """
    if not found:
        raise ValueError("There is no data; give --data, or data.files in the recipe.")
    settings = recipe.data.pack(recipe.steps.seed)
    return [Packs(one, settings, epochs=recipe.steps.epochs) for one in found]


def held_out_packs(recipe: Recipe, held_out: list[Documents]) -> list[Packs]:
    """What is measured, packed, each file once; no device is used."""
    settings = recipe.data.pack(recipe.steps.seed)
    return [Packs(one, settings, epochs=1) for one in held_out]


def warn(notes: Iterable[str]) -> None:
    """Tell what was noticed of data, once for all processes."""
    for note in notes if jax.process_index() == 0 else ():
        warnings.warn(note, stacklevel=3)


def batches(recipe: Recipe, found: list[Documents]) -> Any:
    """The part of all steps' batches that is for this process. Warns of data that is not used.

    Raises:
      ValueError: no data, or a batch that the processes cannot share.
    """
    packed = packs(recipe, found)
    warn(note for one in packed for note in one.notes())
    return dataset.batches(
        packed,
        batch=recipe.steps.batch,
        part=packs_here(recipe.steps.batch, recipe.steps.parts, make_mesh(recipe)),
        weights=[weight for _, weight in map(weighted, recipe.data.files)],
    )


def packs_here(batch: int, parts: int, mesh: Mesh | None) -> list[int]:
    """The packs of a batch that this process's devices hold, part after part."""
    rows, groups = batch // parts, sharding.row_groups(mesh)
    shares = [dataset.share(rows, group, groups) for group in sharding.groups_of(mesh)]
    return [part * rows + row for part in range(parts) for share in shares for row in share]


def count_steps(recipe: Recipe, data: Any) -> int:
    """How many steps the run has: what is asked for, or as many as there are batches."""
    return min(recipe.steps.steps or len(data), len(data))


def prepare(
    recipe: Recipe, steps: int, tokens: int, progress: Progress | None = None
) -> tuple[Setup, step.State]:
    """Load the model and make the optimiser, and the state before the first step.

    Args:
      recipe: the run's.
      steps: how many it has, for the learning rate.
      tokens: of a step, for the warning of Muon's cost.
      progress: told of the loading.

    Raises:
      ValueError: the model cannot be loaded, or the recipe asks for what it does not have.
    """
    processes.keep_no_programs()
    mesh = make_mesh(recipe)
    tokenizer = text_tokenizer(recipe)
    what, source = recipe.what, recipe.model
    # Loading takes minutes: told before.
    check(recipe)
    adapts = recipe.adapter is not None
    loaded = v4jax.load(
        source.path,
        dtype=source.dtype if adapts else source.master,
        numerics=source.numerics,
        keep_quantised=adapts and source.keep_quantised,
        mesh=mesh,
        progress=progress,
    )
    cfg = loaded.config
    parts = trainable.split(loaded.engine.model, cfg, what, jax.random.key(recipe.steps.seed))
    declared = trainable.declare(cfg, what)
    if mesh is not None and adapts:
        places = sharding.shardings(declared, mesh, parts.trained)
        parts = parts._replace(trained=jax.device_put(parts.trained, places))
    if recipe.optimizer.rule == "muon":
        optimizer.warn_of_cost(declared, cfg, facts.report(cfg).active, tokens)
    rate = learning_rate(recipe, steps)
    rule = optimizer.make(
        declared,
        cfg,
        rate,
        rule=recipe.optimizer.rule,
        weight_decay=recipe.optimizer.weight_decay,
    )
    setup = Setup(
        settings=_settings(recipe, cfg),
        frozen=parts.frozen,
        rule=rule,
        rate=rate,
        tokenizer=tokenizer,
        mesh=mesh,
    )
    return setup, _first(parts, rule, mesh, recipe.steps.seed)


def check(recipe: Recipe) -> None:
    """Refuse what loading would, as far as the model's configuration tells.

    Raises:
      ValueError: the recipe asks for what the model does not have, or its files do not fit.
    """
    checkpoint = open_checkpoint(hub.resolve(recipe.model.path))
    checkpoint.tokenizer()
    context.check_packing(checkpoint.config)
    if recipe.losses.mtp and not checkpoint.config.num_nextn_predict_layers:
        raise ValueError("losses.mtp is set, and the model has no MTP block; set it to 0.")


def _settings(recipe: Recipe, cfg: ModelConfig) -> step.Settings:
    losses = recipe.losses
    return step.Settings(
        cfg=cfg,
        numerics=numerics.get(recipe.model.numerics),
        what=recipe.what,
        mtp_weight=losses.mtp,
        balance_weight=losses.balance,
        indexer_weight=losses.indexer,
        bias_speed=losses.bias_speed,
        clip=recipe.optimizer.clip,
        remat=recipe.steps.remat,
        unroll=recipe.steps.unroll,
    )


def learning_rate(recipe: Recipe, steps: int) -> Callable[[Any], Any]:
    """The rate of each step: it grows, then falls as the schedule says."""
    chosen = recipe.optimizer
    warmup = min(chosen.warmup, steps)
    rest = max(steps - warmup, 1)
    after: Any = {
        "constant": optax.constant_schedule(chosen.rate),
        "linear": optax.linear_schedule(chosen.rate, chosen.rate * chosen.final, rest),
        "cosine": optax.cosine_decay_schedule(chosen.rate, rest, chosen.final),
    }[chosen.schedule]
    if not warmup:
        return after
    # The first step is not lost on a rate of zero.
    grows = lambda count: chosen.rate * (count + 1) / warmup
    return optax.join_schedules([grows, after], [warmup])


def make_mesh(recipe: Recipe) -> Mesh | None:
    """All devices, arranged as the recipe says; None where there is one.

    Raises:
      ValueError: the sizes do not divide the devices, or these the batch.
    """
    sizes = dataclasses.asdict(recipe.mesh)
    devices, used = jax.device_count(), math.prod(sizes.values())
    if devices % used:
        raise ValueError(f"[mesh] needs a multiple of {used} devices; there are {devices}.")
    rows = devices // sizes["tensor"]
    batch = recipe.steps.batch // recipe.steps.parts
    if batch % rows:
        raise ValueError(
            f"A part of the batch has {batch} packs; use a multiple of the {rows} groups of devices"
            " that share them."
        )
    return None if devices == 1 else sharding.make_mesh(data=devices // used, **sizes)


def place_batch(local: dict[str, np.ndarray], parts: int, mesh: Mesh | None) -> dict[str, Any]:
    """A step's batch on the devices, [A, B, T] each, from this process's packs of it."""
    used = {name: local[name] for name in ("tokens", "trained", "document")}
    cut = {name: x.reshape(parts, -1, x.shape[-1]) for name, x in used.items()}
    if mesh is None:
        return jax.device_put(cut)
    here, groups = sharding.groups_of(mesh), sharding.row_groups(mesh)

    def spread(x_ABT: np.ndarray) -> jax.Array:
        parts, held, length = x_ABT.shape
        rows = held // len(here)
        shape = (parts, rows * groups, length)

        def of_group(index: Any) -> np.ndarray:
            first = here.index((index[1].start or 0) // rows) * rows
            return x_ABT[:, first : first + rows]

        place = sharding.place((None, "batch"), shape, mesh)
        return jax.make_array_from_callback(shape, place, of_group)

    return {name: spread(x_ABT) for name, x_ABT in cut.items()}


def _first(
    parts: Parts, rule: optax.GradientTransformation, mesh: Mesh | None, seed: int
) -> step.State:
    """The state before the first step, every part of it on all devices of the mesh."""
    state = step.begin(parts, rule, seed)
    if mesh is None:
        # Bound to its device as a step's results are, or the second step would be compiled anew.
        return jax.device_put(state, jax.devices()[0])
    whole = NamedSharding(mesh, PartitionSpec())
    spread = lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole)
    return jax.tree.map(spread, state)
