"""A training step as a job of `v4jax plan`, and the mesh that it favours for a recipe."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from v4jax.adapters.lora_settings import Lora
from v4jax.aot import placed
from v4jax.checkpoints import hub
from v4jax.checkpoints.open_checkpoint import open_checkpoint
from v4jax.model import numerics, params, sharding
from v4jax.model.config import ModelConfig
from v4jax.model.segments import segments
from v4jax.model.sharding import AnyMesh
from v4jax.model.transformer import Model
from v4jax.pods import chips, jobs, memory, mesh_search
from v4jax.pods.jobs import Move, Work
from v4jax.pods.serving import weight_bytes

from . import aot, flops, optimizer, preparation, step, trainable
from .full_settings import Full
from .recipe import Recipe

Name = Literal["train-lora", "train-muon", "train-adamw"]
# What the recipes in configs/ have.
_LOSSES = {"mtp_weight": 0.1, "balance_weight": 1e-4, "bias_speed": 1e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A training step.

    Attributes:
      name: the job.
      settings: settings of the step.
      seq_len: tokens of a row.
      batch: rows of a step.
      parts: parts of a step.
      dtype: dtype of fully trained weights, and of frozen ones that are not quantised.
    """

    name: Name
    settings: step.Settings
    seq_len: int
    batch: int
    parts: int = 1
    dtype: Any = jnp.float32

    @property
    def cfg(self) -> ModelConfig:
        return self.settings.cfg

    @property
    def rows(self) -> int:
        return self.batch // self.parts

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Little optimisation, which saves the compiler minutes and costs little memory."""
        return {"exec_time_optimization_effort": -1.0}

    def sizes(self) -> dict[str, int]:
        """The sizes that the user chose."""
        sizes = {"seq": self.seq_len, "global-batch": self.batch}
        return sizes if self.parts == 1 else sizes | {"parts": self.parts}

    def arguments(self, mesh: AnyMesh) -> dict[str, Any]:
        """The weights, trained and frozen; the optimizer's state; the batch."""
        state, frozen, local, _ = aot.arguments(
            self.settings, self._rule, mesh, **self._sizes, dtype=self.dtype
        )
        trained = {"trained": state.trained, "balanced": state.balanced}
        return {"weights": (frozen, trained), "optimizer": state.optimizer, "batch": local}

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The step."""
        # Optax mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            return aot.lower(self.settings, self._rule, mesh, **self._sizes, dtype=self.dtype)

    def work(self, mesh: AnyMesh, arguments: dict[str, Any]) -> Work:
        """What a step asks of a device."""
        cfg, what = self.cfg, self.settings.what
        tokens = jobs.on_each(self.rows, mesh) * self.seq_len
        needed = self._token_flops * self.seq_len * self.batch
        # A layer runs forward, and again before it runs backward, which is twice the work.
        again = (1 if isinstance(what, Full) else 1.5) / 3 * (self.settings.remat != "light")
        dense, routed = weight_bytes(self._declared, self._computed(mesh), mesh)
        gradients = 4.0 * _elements(arguments["weights"][1])
        bodies = sum(part.repeats for part in segments(cfg.layers))
        streams = 2.0 * tokens * cfg.hc_mult * cfg.hidden_size * bodies
        layer = jobs.layer_bytes(cfg, tokens, mesh)
        passes = 3 * self.parts
        return Work(
            flops=needed / mesh.size,
            executed=needed * (1 + again) / mesh.size,
            bytes=passes * (dense + routed + 4 * layer * len(cfg.layers)) + 6 * gradients,
            temporaries=streams + 3 * layer + gradients + _gathered(cfg, dense, mesh),
            moves=self._moves(mesh, tokens, dense, gradients),
            experts=jobs.expected(cfg, tokens, mesh),
            tokens=self.batch * self.seq_len,
        )

    def _moves(
        self, mesh: AnyMesh, tokens: int, dense: float, gradients: float
    ) -> tuple[Move, ...]:
        """Activations between experts, weights gathered over fsdp, gradients summed."""
        passes, layers = 3 * self.parts, len(self.cfg.layers)
        moves = [*jobs.exchange(self.cfg, tokens, mesh, passes)]
        if (fsdp := mesh.shape["fsdp"]) > 1:
            moves.append(Move("all-gather", fsdp, dense / layers, layers * passes))
        if (data := mesh.shape["data"]) > 1:
            moves.append(Move("all-reduce", data, gradients / layers, layers))
        return tuple(moves)

    def _computed(self, mesh: AnyMesh) -> Any:
        """The weights in the form in which the model computes with them."""
        keeps = isinstance(self.settings.what, Lora) and self.cfg.quantized
        declared = self._declared
        model = params.abstract(declared, jnp.bfloat16, self.cfg.expert_dtype if keeps else None)
        return jax.tree.map(placed, model, sharding.shardings(declared, mesh, model))

    @functools.cached_property
    def _declared(self) -> Model:
        return Model(self.cfg)

    @functools.cached_property
    def _token_flops(self) -> float:
        losses = {"mtp": self.settings.mtp_weight > 0, "indexer": self.settings.indexer_weight > 0}
        return flops.per_token(self.cfg, self.settings.what, self.seq_len, **losses)

    @functools.cached_property
    def _rule(self) -> Any:
        declared = trainable.declare(self.cfg, self.settings.what)
        rule = "muon" if self.name == "train-muon" else "adamw"
        return optimizer.make(declared, self.cfg, 1e-4, rule=rule)

    @property
    def _sizes(self) -> dict[str, int]:
        return {"batch": self.batch, "seq_len": self.seq_len, "parts": self.parts}


def job(name: Name, cfg: ModelConfig, *, seq_len: int, batch: int, parts: int) -> Training:
    """The job of a name, as configs/train_lora.toml and train_full.toml have it.

    Raises:
      ValueError: the batch is not a multiple of its parts, or rows are too long.
    """
    if batch % parts:
        raise ValueError(f"--global-batch is {batch}; use a multiple of --parts, {parts}.")
    if seq_len > cfg.max_position_embeddings:
        longest = cfg.max_position_embeddings
        raise ValueError(f"--seq is {seq_len}; the model's own context is {longest}.")
    adapts, drafts = name == "train-lora", cfg.num_nextn_predict_layers > 0
    what = Lora(targets="attn+shared") if adapts else Full(dtype="bfloat16", mtp=drafts)
    losses: dict[str, Any] = {} if adapts else _LOSSES | ({} if drafts else {"mtp_weight": 0.0})
    settings = step.Settings(cfg=cfg, numerics=numerics.OFFICIAL, what=what, **losses)
    return Training(
        name=name,
        settings=settings,
        seq_len=seq_len,
        batch=batch,
        parts=parts,
        dtype=jnp.bfloat16 if adapts else jnp.float32,
    )


def mesh_for(recipe: Recipe) -> dict[str, int]:
    """The sizes of the mesh that arithmetic favours for a recipe and all devices at hand.

    Raises:
      ValueError: the model cannot be read, or no mesh divides it and the batch.
    """
    cfg = open_checkpoint(hub.resolve(recipe.model.path)).config
    adapts = recipe.adapter is not None
    name: Name = "train-lora" if adapts else "train-adamw"
    training = Training(
        name="train-muon" if recipe.optimizer.rule == "muon" else name,
        settings=preparation.step_settings(recipe, cfg),
        seq_len=recipe.data.seq_len,
        batch=recipe.steps.batch,
        parts=recipe.steps.parts,
        dtype=jnp.dtype(recipe.model.dtype if adapts else recipe.model.master),
    )
    return mesh_search.choose(training, chips.of_devices(jax.devices()))


def with_mesh(recipe: Recipe, sizes: dict[str, int]) -> Recipe:
    """The recipe with these sizes; its data axis gets the devices that are left."""
    fields = {field.name for field in dataclasses.fields(recipe.mesh)}
    chosen = {axis: size for axis, size in sizes.items() if axis in fields}
    return dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, **chosen))


def _elements(tree: Any) -> int:
    """Elements of one device's parts of all arrays."""
    return sum(memory.shard_bytes(x) // x.dtype.itemsize for x in jax.tree.leaves(tree))


def _gathered(cfg: ModelConfig, dense: float, mesh: AnyMesh) -> float:
    """Bytes of the weights of two layers, gathered over fsdp."""
    return 2 * dense / len(cfg.layers) if mesh.shape["fsdp"] > 1 else 0.0
