"""A run's settings: a TOML file, which flags override, to frozen dataclasses.

The tables of the file are the classes below, their keys the fields. `[adapter]` trains low-rank
updates, `[full]` the weights themselves; there is one of the two.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from v4jax.adapters.lora import Lora
from v4jax.text.files import read_text

from .data.packing import PackSettings
from .data.rendering import RenderSettings
from .data.rows import RowSettings
from .tables import at_least, made
from .trainable import Full


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model is trained, and how it is held.

    Attributes:
      path: a Hugging Face directory, a native checkpoint, or a Hub id.
      dtype: of activations, and of frozen weights that are not kept quantised.
      master: dtype of weights that are trained in full.
      keep_quantised: hold frozen FP8 and FP4 weights as they are.
      numerics: 'official' rounds where DeepSeek's runtime does, 'hf' where transformers does.
    """

    path: str = ""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    master: Literal["bfloat16", "float32"] = "float32"
    keep_quantised: bool = dataclasses.field(default=True, metadata={"was": "keep"})
    numerics: Literal["official", "hf"] = "official"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on.

    Attributes:
      files: JSONL files; 'chats.jsonl:2' takes twice as many packs from a file as 'more.jsonl'.
      format, ignore: see `rows.RowSettings`.
      skip_wrong: leave rows out that are wrong, after saying how many.
      seq_len, too_long, untrained, window: see `packing.PackSettings`.
      thinking_mode, reasoning_effort, drop_thinking, revision, reasoning, turns: see
        `rendering.RenderSettings`.
    """

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
        """Refuse at once what reading, rendering or packing would."""
        self.read()
        self.pack(0)
        self.render()
        for name in self.files:
            weighted(name)

    def read(self) -> RowSettings:
        """How rows are read."""
        return RowSettings(format=self.format, ignore=self.ignore)

    def pack(self, seed: int) -> PackSettings:
        """How documents are packed."""
        return PackSettings(
            seq_len=self.seq_len,
            too_long=self.too_long,
            untrained=self.untrained,
            window=self.window,
            seed=seed,
        )

    def render(self) -> RenderSettings:
        """How rows become tokens."""
        fields = dataclasses.fields(RenderSettings)
        return RenderSettings(**{field.name: getattr(self, field.name) for field in fields})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights are moved.

    Attributes:
      rule: 'muon' moves matrices by Muon and the rest by AdamW.
      rate: learning rate at its highest.
      warmup: steps in which it grows to that.
      schedule: what comes then: 'cosine' or 'linear' down to `final` of the rate, or 'constant'.
      final: share of the rate at the last step.
      weight_decay: per step and learning rate.
      clip: gradients longer than this are shortened to it.
    """

    rule: Literal["adamw", "muon"] = "adamw"
    rate: float = 1e-4
    warmup: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers that move nothing or the wrong way."""
        at_least(self, "rate", 0.0, above=True)
        at_least(self, "clip", 0.0, above=True)
        for name in ("warmup", "final", "weight_decay"):
            at_least(self, name, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """What is minimised beside the cross-entropy; see `step.Settings`."""

    mtp: float = 0.0
    balance: float = 0.0
    indexer: float = 0.0
    bias_speed: float = 0.0

    def __post_init__(self) -> None:
        """Refuse weights below 0."""
        for field in dataclasses.fields(self):
            at_least(self, field.name, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """How long a run is, and of what its steps are made.

    Attributes:
      steps: how many; None: as many as `epochs` need.
      epochs: how often each file is read; None with `steps`: without end.
      batch: packs of a step.
      parts: into which a batch is cut that follow one another, to save memory.
      remat: compute activations anew in the backward pass; false keeps products and what
        attention and experts gave.
      unroll: compile each layer by itself, instead of a loop over those that are alike: on CPUs a
        few percent faster, for more memory and a compilation that grows with the layers.
      seed: of the order of the data, of adapters and of dropout.
    """

    steps: int | None = None
    epochs: int | None = None
    batch: int = 8
    parts: int = 1
    remat: bool = True
    unroll: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that make no step."""
        for name in ("batch", "parts"):
            at_least(self, name, 1)
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None:
                at_least(self, name, 1)
        if self.batch % self.parts:
            raise ValueError(f"batch is {self.batch}; use a multiple of parts, {self.parts}.")
        at_least(self, "seed", 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When the run is saved: every so many steps, on SIGTERM, and at the end.

    Attributes:
      every: steps from one to the next.
      keep: how many are kept, the newest; and the best one, where runs are evaluated.
    """

    every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        """Refuse numbers that keep nothing."""
        at_least(self, "every", 1)
        at_least(self, "keep", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured on other data while the run goes on.

    Attributes:
      files: JSONL files; none: nothing is measured.
      every: steps from one evaluation to the next; there is one at the end.
      batches: at most so many.
      prompts: texts that the model continues.
      tokens: of a continuation.
      patience: stop after so many evaluations without a better loss; 0: never.
    """

    files: tuple[str, ...] = ()
    every: int = 100
    batches: int = 16
    prompts: tuple[str, ...] = ()
    tokens: int = 64
    patience: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that measure nothing."""
        for name in ("every", "batches", "tokens"):
            at_least(self, name, 1)
        at_least(self, "patience", 0)
        if self.patience and not self.files:
            raise ValueError(
                f"patience is {self.patience}, but there are no files, whose loss could get better."
            )
        for name in self.files:
            if weighted(name)[0] != name:
                raise ValueError(f"files has {name}; files of an evaluation have no weights.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """What happens when a step goes wrong. Its batch is saved in `bad_batches`.

    Attributes:
      spike: a loss this many times the median of the last 50 is wrong too; 0: none is.
      action: 'skip' the update and go on, or 'stop'.
      most: with 'skip', stop after so many wrong steps in a row.
    """

    spike: float = 0.0
    action: Literal["skip", "stop"] = "skip"
    most: int = 5

    def __post_init__(self) -> None:
        """Refuse a bar that every loss is above."""
        if self.spike and not self.spike > 1.0:
            raise ValueError(f"spike is {self.spike}; use more than 1, or 0 for none.")
        at_least(self, "most", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """Where metrics go beside `metrics.jsonl`.

    Attributes:
      tensorboard: to event files in the run's directory `tensorboard`; needs tensorboardX.
    """

    tensorboard: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How devices are arranged, see `v4jax.model.sharding`; `data` takes those that are left."""

    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        for field in dataclasses.fields(self):
            at_least(self, field.name, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run. `out` is its directory, made at its beginning."""

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
    log: Log = Log()
    mesh: Mesh = Mesh()

    def __post_init__(self) -> None:
        """Refuse what the parts do not allow together."""
        if (self.adapter is None) == (self.full is None):
            raise ValueError("The recipe needs one of the tables [adapter] and [full].")
        if self.adapter is not None and (any(dataclasses.astuple(self.losses))):
            raise ValueError(
                "[losses] trains MTP blocks, routers and indexers, which an adapter leaves as they"
                " are; leave it out, or train in full."
            )
        if self.full is not None:
            if self.losses.mtp and not self.full.mtp:
                raise ValueError("losses.mtp is set and full.mtp is false; set both or neither.")
            if bool(self.losses.indexer) != self.full.indexers:
                raise ValueError(
                    "losses.indexer trains the indexers and full.indexers lets it; set both or"
                    " neither."
                )
        if self.steps.steps is None and self.steps.epochs is None:
            raise ValueError("The run has no end; give steps.steps or steps.epochs.")
        if self.steps.epochs is not None and len(self.data.files) > 1:
            raise ValueError("steps.epochs is of one file; with several give steps.steps.")
        if self.adapter is not None and self.optimizer.rule == "muon":
            raise ValueError("Muon trains weights in full; for an adapter use 'adamw'.")

    @property
    def what(self) -> Full | Lora:
        """What is trained."""
        if self.adapter is not None:
            return self.adapter
        assert self.full is not None
        mtp = self.full.mtp and self.losses.mtp > 0
        return dataclasses.replace(self.full, dtype=self.model.dtype, mtp=mtp)


def read(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a TOML file.

    Args:
      path: of the file.
      overrides: by 'table.key' or 'key', as TOML would have the value; a word need not be quoted.

    Raises:
      ValueError: the file is not TOML, or names or values are not a recipe's.
    """
    try:
        table = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not TOML ({error}).") from None
    try:
        for key, text in (overrides or {}).items():
            _override(table, key, _toml(text))
        return from_table(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def weighted(name: str) -> tuple[str, float]:
    """A file and its weight: 'chats.jsonl:2' is twice as much as 'chats.jsonl'.

    Raises:
      ValueError: the weight is no share.
    """
    path, colon, text = name.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        return name, 1.0
    if not colon:
        return name, 1.0
    if not (path and 0.0 < weight < float("inf")):
        raise ValueError(f"files has {name}; a weight is a number above 0.")
    return path, weight


def _override(table: dict[str, Any], key: str, value: Any) -> None:
    *tables, field = key.split(".")
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{name} is {table!r:.100}; it is a table.")
    table[field] = value


def from_table(table: Mapping[str, Any]) -> Recipe:
    """The recipe that nested tables describe, as `tables.to_table` makes them."""
    return made(Recipe, table)


def _toml(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if table.keys() == {"value"} else text
