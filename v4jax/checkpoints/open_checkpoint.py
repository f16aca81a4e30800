"""A checkpoint directory, native or Hugging Face, before its weights are read."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from v4jax.checkpoints import config_file, native, passengers, release_weights, unfinished
from v4jax.checkpoints.disk import CheckpointError
from v4jax.checkpoints.safetensors_directory import CONFIG, locate
from v4jax.model.config import ModelConfig
from v4jax.model.transformer import Model
from v4jax.text.tokenizer import Tokenizer
from v4jax.waiting import Progress


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
    """A directory whose configuration has been read.

    Attributes:
      directory: a native or a Hugging Face checkpoint.
      config: its configuration; weights that it defines may turn out to be missing.
    """

    directory: Path
    config: ModelConfig

    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, if it has one; see `passengers.tokenizer`."""
        return passengers.tokenizer(self.directory, self.config.vocab_size)

    def load(
        self, dtype: Any, *, keep_quantised: bool, mesh: Mesh | None, progress: Progress | None
    ) -> tuple[Model, ModelConfig]:
        """Load the weights, and the configuration that matches them; see `native.load`."""
        read: Any = native.load if native.is_native(self.directory) else release_weights.load
        model, cfg = read(
            self.directory, dtype=dtype, keep_quantised=keep_quantised, mesh=mesh, progress=progress
        )
        ends = config_file.end_tokens(self.directory, cfg)
        return model, dataclasses.replace(cfg, eos_token_ids=ends)


def open_checkpoint(directory: Path) -> OpenCheckpoint:
    """Read a directory's configuration.

    Raises:
      CheckpointError: it is neither kind of checkpoint, or its configuration is damaged.
    """
    if native.is_native(directory):
        cfg = native.read_config(directory, native.read_manifest(directory))
        return OpenCheckpoint(directory, cfg)
    unfinished.refuse_unfinished(directory)
    if not os.path.lexists(directory / CONFIG):
        raise CheckpointError(
            f"{directory}: is not a checkpoint: it has no {CONFIG}, and no {native.MANIFEST}. Give "
            "the directory that holds one."
        )
    return OpenCheckpoint(directory, config_file.read(locate(directory, CONFIG)))
