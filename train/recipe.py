"""A run's settings: from a TOML file, overridden by flags, to frozen dataclasses.

The file's tables are the classes below, its keys their fields; `v4jax-train train --help` shows
what `Attributes` say. A recipe has either `[adapter]`, for low-rank updates, or `[full]`.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from v4jax.adapters.lora_settings import Lora
from v4jax.text.files import read_toml

from .data.packing import PackSettings
from .data.rendering import RenderSettings
from .data.row_files import weighted
from .data.rows import RowSettings
from .full_settings import Full
from .tables import at_least, from_nested

_POLICIES = ("full", "experts", "light")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model to train, and the formats of its weights.

    Attributes:
      path: a Hugging Face directory, a native checkpoint, or a Hub id.
      dtype: dtype of activations and, with an adapter, of base weights not kept quantised.
      master: dtype in which full training holds and updates weights.
      keep_quantised: with an adapter, leave the base's FP8 and FP4 weights quantised.
      numerics: 'official' rounds where DeepSeek's runtime does, 'hf' where transformers does.
    """

    path: str = ""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    master: Literal["bfloat16", "float32"] = "float32"
    keep_quantised: bool = dataclasses.field(default=True, metadata={"was": "keep"})
    numerics: Literal["official", "hf"] = "official"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Training data.

    Attributes:
      files: JSONL files to train on. A weight may follow a name: 'chats.jsonl:2' gets twice as many
        packs as 'more.jsonl'.
      skip_wrong: leave out invalid rows and report how many, instead of failing.
    """

    described_by = (RowSettings, PackSettings, RenderSettings)  # fields not listed above

    files: tuple[str, ...] = ()
    format: str = "auto"
    ignore: tuple[str, ...] = ()
    skip_wrong: bool = False
    seq_len: int = 4096
    too_long: str = "error"
    untrained: str = "drop"
    window: int = 8192
    thinking_mode: str | None = None
    reasoning_effort: str | None = None
    drop_thinking: bool = True
    revision: str = "april"
    reasoning: bool = True
    turns: str = "all"

    def __post_init__(self) -> None:
        """Reject early what reading, rendering or packing would reject."""
        self.read()
        self.pack(0)
        self.render()
        for name in self.files:
            weighted(name)

    def read(self) -> RowSettings:
        """How rows are read."""
        return RowSettings(**self._fields_of(RowSettings))

    def pack(self, seed: int) -> PackSettings:
        """How documents are packed."""
        return PackSettings(**self._fields_of(PackSettings), seed=seed)

    def render(self) -> RenderSettings:
        """How rows become tokens."""
        return RenderSettings(**self._fields_of(RenderSettings))

    def _fields_of(self, kind: Any) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(kind)]
        return {name: value for name, value in vars(self).items() if name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimiser and its learning rate.

    Attributes:
      rule: 'adamw', or 'muon': Muon for matrices and AdamW for the rest.
      rate: peak learning rate.
      warmup: steps of linear warmup to the peak rate.
      schedule: after warmup: 'cosine' or 'linear' decay to `final` times the rate, or 'constant'.
      final: rate at the end of the schedule, as a fraction of the peak rate.
      weight_decay: decoupled weight decay; each step shrinks weights by learning rate times this.
      clip: largest norm of the gradient; a longer one is scaled down to it.
    """

    rule: Literal["adamw", "muon"] = "adamw"
    rate: float = 1e-4
    warmup: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Reject rates that cannot train."""
        at_least(self, 0.0, "rate", "clip", above=True)
        at_least(self, 0, "warmup", "final", "weight_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses besides the cross-entropy, and the rule for routers' biases; for full training.

    Attributes:
      mtp: weight of the MTP blocks' loss; 0: they do not run and are not trained.
      balance: weight of the loss that keeps experts equally busy within a document.
      indexer: weight of the indexers' divergence from attention; 0: indexers are not trained.
      bias_speed: how far a step moves each bias of the routers; 0: biases do not change.
    """

    mtp: float = 0.0
    balance: float = 0.0
    indexer: float = 0.0
    bias_speed: float = 0.0

    def __post_init__(self) -> None:
        """Reject negative weights."""
        at_least(self, 0.0, *vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """The length of a run, and what a step consists of.

    Attributes:
      steps: number of steps; unset: as many as `epochs` needs.
      epochs: number of passes over the file; unset: data repeats until `steps` is reached.
      batch: packs per step.
      parts: number of parts a batch is split into, run one after another to save memory.
      remat: what the backward pass recomputes: 'full', everything but the streams between layers;
        'experts', everything but those and the routed experts' outputs; 'light', only what costs
        little. Several are for the segments of layers, one for each (see 'v4jax inspect').
      unroll: compile each layer separately instead of looping over equal ones: a few percent faster
        on CPUs, for more memory and a compile time that grows with the number of layers.
      seed: seed of the data's order, of an adapter's initial values and of dropout.
    """

    steps: int | None = None
    epochs: int | None = None
    batch: int = 8
    parts: int = 1
    remat: tuple[str, ...] = ("full",)
    unroll: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject numbers that make no step."""
        given = [name for name in ("steps", "epochs") if getattr(self, name) is not None]
        at_least(self, 1, "batch", "parts", *given)
        if self.batch % self.parts:
            raise ValueError(f"batch is {self.batch}; use a multiple of parts, {self.parts}.")
        at_least(self, 0, "seed")
        if wrong := [policy for policy in self.remat if policy not in _POLICIES]:
            raise ValueError(f"remat is {wrong[0]!r}; it must be one of {', '.join(_POLICIES)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Saved states. A run is also saved on SIGTERM and at its end.

    Attributes:
      every: steps between saved states.
      keep: number of newest states to keep; with evaluations, the best state is kept too.
      local: directory on each host, such as a RAM disk, for states saved more often; after a
        restart on the same hosts and mesh the newest is used. Empty: none.
      local_every: steps between states in `local`.
    """

    every: int = 100
    keep: int = 2
    local: str = ""
    local_every: int = 10

    def __post_init__(self) -> None:
        """Reject numbers that keep nothing."""
        at_least(self, 1, "every", "keep", "local_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation on held-out data during the run.

    Attributes:
      files: JSONL files of held-out data; empty: no loss is measured.
      every: steps between evaluations; the run also ends with one.
      batches: maximum number of batches per evaluation.
      prompts: texts for the model to continue at each evaluation.
      tokens: maximum length of a continuation, in tokens.
      patience: stop after this many evaluations in a row without a better loss; 0: never.
    """

    files: tuple[str, ...] = ()
    every: int = 100
    batches: int = 16
    prompts: tuple[str, ...] = ()
    tokens: int = 64
    patience: int = 0

    def __post_init__(self) -> None:
        """Reject numbers that measure nothing."""
        at_least(self, 1, "every", "batches", "tokens")
        at_least(self, 0, "patience")
        if self.patience and not self.files:
            raise ValueError(f"patience is {self.patience}, but there are no files to evaluate.")
        for name in self.files:
            if weighted(name)[0] != name:
                raise ValueError(f"files has {name}; evaluation files take no weights.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Bad steps: their loss or gradient is not finite. Their batches go to `bad_batches`.

    Attributes:
      spike: a loss above this many times the median of the last 50 is bad too; 0: off.
      action: 'skip' the update and continue, or 'stop' the run.
      most: with 'skip', stop after this many bad steps in a row.
    """

    spike: float = 0.0
    action: Literal["skip", "stop"] = "skip"
    most: int = 5

    def __post_init__(self) -> None:
        """Reject a limit that ordinary losses exceed."""
        if self.spike and not self.spike > 1.0:
            raise ValueError(f"spike is {self.spike}; use more than 1, or 0 for none.")
        at_least(self, 1, "most")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watchdog:
    """Runs without progress: all threads' stacks are written to stderr, and the status is 124.

    Attributes:
      factor: how many times the median of the last 50 a step may take, saving and evaluation
        excluded; 0: any time.
      least: seconds that a step may always take.
    """

    factor: float = 20.0
    least: float = 900.0

    def __post_init__(self) -> None:
        """Reject a limit that ordinary steps exceed."""
        if self.factor and not self.factor > 1.0:
            raise ValueError(f"factor is {self.factor}; use more than 1, or 0 for no limit.")
        at_least(self, 0.0, "least", above=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """Metrics besides `metrics.jsonl`.

    Attributes:
      tensorboard: write event files to `tensorboard` in the run's directory; needs tensorboardX.
    """

    tensorboard: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Mesh of devices, see `v4jax.model.sharding`; its `data` axis gets the remaining devices.

    Attributes:
      fsdp: size of the axis that shards the storage of all weights; also splits the batch.
      expert: size of the axis that shards routed experts; also splits the batch.
      tensor: size of the axis that shards experts, heads, the shared expert and the vocabulary.
    """

    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        """Reject sizes below 1."""
        at_least(self, 1, *vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run.

    Attributes:
      out: directory of the run, created at its start.
    """

    out: str = ""
    model: ModelSource = ModelSource()
    data: Data = Data()
    adapter: Lora | None = None
    full: Full | None = None
    optimizer: Optimizer = Optimizer()
    losses: Losses = Losses()
    steps: Steps = Steps()
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    guard: Guard = Guard()
    watchdog: Watchdog = Watchdog()
    log: Log = Log()
    mesh: Mesh = Mesh()

    def __post_init__(self) -> None:
        """Reject tables that contradict each other."""
        if (self.adapter is None) == (self.full is None):
            raise ValueError("The recipe needs one of the tables [adapter] and [full].")
        if self.adapter is not None and (any(dataclasses.astuple(self.losses))):
            raise ValueError(
                "[losses] trains MTP blocks, routers and indexers, which an adapter leaves"
                " unchanged; remove it, or train in full."
            )
        if self.full is not None:
            if self.losses.mtp and not self.full.mtp:
                raise ValueError("losses.mtp is set and full.mtp is false; set both or neither.")
            if bool(self.losses.indexer) != self.full.indexers:
                raise ValueError("losses.indexer needs full.indexers; set both or neither.")
            if self.full.dtype not in (None, self.model.dtype):
                raise ValueError("full.dtype is set by model.dtype; remove it.")
        if self.steps.steps is None and self.steps.epochs is None:
            raise ValueError("The run has no end; set steps.steps or steps.epochs.")
        if self.steps.epochs is not None and len(self.data.files) > 1:
            raise ValueError("steps.epochs needs a single file; with several set steps.steps.")
        if self.adapter is not None and self.optimizer.rule == "muon":
            raise ValueError("Muon only trains in full; for an adapter use 'adamw'.")

    @property
    def what(self) -> Full | Lora:
        """What is trained."""
        if self.adapter is not None:
            return self.adapter
        assert self.full is not None
        mtp = self.full.mtp and self.losses.mtp > 0
        return dataclasses.replace(self.full, dtype=self.model.dtype, mtp=mtp)


def read(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read the recipe in a TOML file.

    Args:
      path: path of the file.
      overrides: values by 'table.key' or 'key', written as in TOML; strings need no quotes.

    Raises:
      ValueError: the file is not TOML, or a name or value is not allowed in a recipe.
    """
    table = read_toml(path)
    try:
        for key, text in (overrides or {}).items():
            _override(table, key, _toml(text))
        return from_table(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _override(table: dict[str, Any], key: str, value: Any) -> None:
    *tables, field = key.split(".")
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{name} is {table!r:.100}; it must be a table.")
    table[field] = value


def from_table(table: Mapping[str, Any]) -> Recipe:
    """The recipe in nested tables, as `tables.to_table` returns them."""
    return from_nested(Recipe, table)


def _toml(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if table.keys() == {"value"} else text
