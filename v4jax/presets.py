"""The configurations that ship with the package."""

import tomllib
from importlib import resources
from typing import Any

from v4jax.arguments import TEXT, checked
from v4jax.model import config_json
from v4jax.model.config import ModelConfig


def names() -> list[str]:
    """Names of all presets, such as 'flash'."""
    files = (file.name for file in resources.files("v4jax_configs").iterdir())
    stems = (name.removesuffix(".toml") for name in files if name.endswith(".toml"))
    # The others are training recipes.
    return sorted(stem for stem in stems if not stem.startswith("train_"))


@checked(name=TEXT)
def get(name: str) -> ModelConfig:
    """The configuration of a preset.

    Raises:
      ValueError: there is no preset of this name; the message lists all names.
    """
    return config_json.from_json(get_json(name), where=f"preset '{name}'")


@checked(name=TEXT)
def get_json(name: str) -> dict[str, Any]:
    """A preset in the spelling of `config.json`.

    Raises:
      ValueError: there is no preset of this name; the message lists all names.
    """
    if name not in names():
        raise ValueError(f"No preset '{name}'; use one of {', '.join(names())}.")
    return tomllib.loads(resources.files("v4jax_configs").joinpath(f"{name}.toml").read_text())
