"""Everything a run needs, from its recipe: the split model, optimiser, batches and devices."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import v4jax
from v4jax import facts
from v4jax.checkpoints import hub
from v4jax.checkpoints.open_checkpoint import open_checkpoint
from v4jax.model import context, numerics, sharding
from v4jax.model.config import ModelConfig
from v4jax.model.segments import segments
from v4jax.text.tokenizer import Tokenizer

from . import optimizer, processes, step, trainable
from .data import dataset, documents
from .data.dataset import Packs
from .data.documents import Documents
from .data.rendering import Renderer
from .data.row_files import weighted
from .recipe import Recipe
from .trainable import Parts


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that is ready to start.

    Attributes:
      settings: settings compiled into its step.
      frozen: the part of the model that no step changes.
      rule: the optimiser.
      rate: learning rate by step.
      tokenizer: the model's tokenizer.
      mesh: mesh of all devices; None: a single device.
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
      ValueError: the recipe names no model, or the model has no tokenizer.
    """
    if not recipe.model.path:
        raise ValueError("No model is named; give --model, or model.path in the recipe.")
    directory = hub.resolve(recipe.model.path, allow_patterns=["tokenizer.json"])
    return Tokenizer.load(directory)


def read_data(recipe: Recipe, tokenizer: Tokenizer, files: tuple[str, ...]) -> list[Documents]:
    """The documents of each file; names may have a weight, which is ignored."""
    renderer, data = Renderer(tokenizer, recipe.data.render()), recipe.data
    return [
        documents.load(name, renderer, skip_wrong=data.skip_wrong, settings=data.read())
        for name, _ in map(weighted, files)
    ]


def packs(recipe: Recipe, files: list[Documents]) -> list[Packs]:
    """Pack the training data; uses no device.

    Raises:
      ValueError: there is no data, or it cannot be packed.
    """
    if not files:
        raise ValueError("There is no data; give --data, or data.files in the recipe.")
    settings = recipe.data.pack(recipe.steps.seed)
    return [Packs(file, settings, epochs=recipe.steps.epochs) for file in files]


def held_out_packs(recipe: Recipe, held_out: list[Documents]) -> list[Packs]:
    """Pack the evaluation data, for one epoch; uses no device."""
    settings = recipe.data.pack(recipe.steps.seed)
    return [Packs(file, settings, epochs=1) for file in held_out]


def warn(notes: Iterable[str]) -> None:
    """Issue notes about data as warnings, in the first process only."""
    for note in notes if jax.process_index() == 0 else ():
        warnings.warn(note, stacklevel=3)


def batches(recipe: Recipe, files: list[Documents]) -> Any:
    """The batches of all steps, as far as this process loads them. Warns about unused data.

    Raises:
      ValueError: there is no data, or processes cannot share the batch evenly.
    """
    packed = packs(recipe, files)
    warn(note for packs in packed for note in packs.notes())
    return dataset.batches(
        packed,
        batch=recipe.steps.batch,
        part=packs_here(recipe.steps.batch, recipe.steps.parts, make_mesh(recipe)),
        weights=[weight for _, weight in map(weighted, recipe.data.files)],
    )


def packs_here(batch: int, parts: int, mesh: Mesh | None) -> list[int]:
    """Indices of the packs of a batch that this process's devices hold, part after part."""
    rows, groups = batch // parts, sharding.row_groups(mesh)
    shares = [dataset.share(rows, group, groups) for group in sharding.groups_of(mesh)]
    return [part * rows + row for part in range(parts) for share in shares for row in share]


def count_steps(recipe: Recipe, data: Any) -> int:
    """The number of steps of a run: as in the recipe, or fewer if the data has fewer batches."""
    return min(recipe.steps.steps or len(data), len(data))


def prepare(recipe: Recipe, steps: int) -> tuple[Setup, step.State]:
    """Load the model, and create the optimiser and the state before the first step.

    Args:
      recipe: the run's recipe.
      steps: number of steps, for the learning rate.

    Raises:
      ValueError: the model cannot be loaded, or lacks something that the recipe needs.
    """
    processes.keep_no_programs()
    mesh = make_mesh(recipe)
    tokenizer = text_tokenizer(recipe)
    what, source = recipe.what, recipe.model
    check(recipe)  # before loading, which may take minutes
    adapts = recipe.adapter is not None
    loaded = v4jax.load(
        source.path,
        dtype=source.dtype if adapts else source.master,
        numerics=source.numerics,
        keep_quantised=adapts and source.keep_quantised,
        mesh=mesh,
    )
    cfg = loaded.config
    parts = trainable.split(loaded.weights, cfg, what, jax.random.key(recipe.steps.seed))
    declared = trainable.declare(cfg, what)
    if mesh is not None and adapts:
        places = sharding.shardings(declared, mesh, parts.trained)
        parts = parts._replace(trained=jax.device_put(parts.trained, places))
    if recipe.optimizer.rule == "muon":
        tokens = recipe.steps.batch * recipe.data.seq_len
        optimizer.warn_of_cost(declared, cfg, facts.report(cfg).active, tokens)
    rate = learning_rate(recipe, steps)
    rule = optimizer.make(
        declared, cfg, rate, rule=recipe.optimizer.rule, weight_decay=recipe.optimizer.weight_decay
    )
    setup = Setup(
        settings=step_settings(recipe, cfg),
        frozen=parts.frozen,
        rule=rule,
        rate=rate,
        tokenizer=tokenizer,
        mesh=mesh,
    )
    return setup, _initial_state(parts, rule, mesh, recipe.steps.seed)


def check(recipe: Recipe) -> None:
    """Reject what loading would reject, as far as the model's configuration shows.

    Raises:
      ValueError: the model lacks something that the recipe needs, or its files do not match.
    """
    checkpoint = open_checkpoint(hub.resolve(recipe.model.path))
    checkpoint.tokenizer()
    context.check_packing(checkpoint.config)
    if recipe.losses.mtp and not checkpoint.config.num_nextn_predict_layers:
        raise ValueError("losses.mtp is set, but the model has no MTP block; set it to 0.")
    remat, parts = recipe.steps.remat, segments(checkpoint.config.layers)
    if len(remat) not in (1, len(parts)):
        raise ValueError(
            f"steps.remat has {len(remat)} policies; the model has {len(parts)} segments of layers."
            " Give one, or as many as segments."
        )


def step_settings(recipe: Recipe, cfg: ModelConfig) -> step.Settings:
    """The settings of a step that a recipe asks for."""
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
        remat=cast(Any, recipe.steps.remat),
        unroll=recipe.steps.unroll,
    )


def learning_rate(recipe: Recipe, steps: int) -> Callable[[Any], Any]:
    """The learning rate by step: linear warmup, then the recipe's schedule."""
    settings = recipe.optimizer
    warmup = min(settings.warmup, steps)
    rest = max(steps - warmup, 1)
    after: Any = {
        "constant": optax.constant_schedule(settings.rate),
        "linear": optax.linear_schedule(settings.rate, settings.rate * settings.final, rest),
        "cosine": optax.cosine_decay_schedule(settings.rate, rest, settings.final),
    }[settings.schedule]
    if not warmup:
        return after
    # count + 1, so that the first step is not wasted on a rate of zero.
    rising = lambda count: settings.rate * (count + 1) / warmup
    return optax.join_schedules([rising, after], [warmup])


def make_mesh(recipe: Recipe) -> Mesh | None:
    """The recipe's mesh of all devices; None for a single device.

    Raises:
      ValueError: the sizes do not divide the devices, or the devices the batch.
    """
    sizes = dataclasses.asdict(recipe.mesh)
    devices, used = jax.device_count(), math.prod(sizes.values())
    if devices % used:
        raise ValueError(f"[mesh] needs a multiple of {used} devices; there are {devices}.")
    rows = devices // sizes["tensor"]
    batch = recipe.steps.batch // recipe.steps.parts
    if batch % rows:
        raise ValueError(
            f"A part of the batch has {batch} packs; it must be a multiple of the {rows} groups of"
            " devices that share them."
        )
    return None if devices == 1 else sharding.make_mesh(data=devices // used, **sizes)


def place_batch(local: dict[str, np.ndarray], parts: int, mesh: Mesh | None) -> dict[str, Any]:
    """Put a step's batch on the devices, [A, B, T] each, from this process's packs."""
    used = {name: local[name] for name in ("tokens", "trained", "document")}
    split = {name: x.reshape(parts, -1, x.shape[-1]) for name, x in used.items()}
    if mesh is None:
        return jax.device_put(split)
    here, groups = sharding.groups_of(mesh), sharding.row_groups(mesh)

    def shard(x_ABT: np.ndarray) -> jax.Array:
        parts, local_rows, length = x_ABT.shape
        rows = local_rows // len(here)
        shape = (parts, rows * groups, length)

        def of_group(index: Any) -> np.ndarray:
            first = here.index((index[1].start or 0) // rows) * rows
            return x_ABT[:, first : first + rows]

        place = sharding.place((None, "batch"), shape, mesh)
        return jax.make_array_from_callback(shape, place, of_group)

    return {name: shard(x_ABT) for name, x_ABT in split.items()}


def _initial_state(
    parts: Parts, rule: optax.GradientTransformation, mesh: Mesh | None, seed: int
) -> step.State:
    """The state before the first step; arrays without a sharding are replicated on the mesh."""
    state = step.begin(parts, rule, seed)
    if mesh is None:
        # Committed to its device like a step's results, or the second step would compile again.
        return jax.device_put(state, jax.devices()[0])
    replicated = NamedSharding(mesh, PartitionSpec())
    place = lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, replicated)
    return jax.tree.map(place, state)
