"""The configurations that ship with the package."""

import tomllib
from importlib import resources
from typing import Any

from v4jax.arguments import TEXT, checked
from v4jax.model import config_json
from v4jax.model.config import ModelConfig


def preset_names() -> list[str]:
    """Names that `preset` takes, such as 'flash'."""
    files = (file.name for file in resources.files("v4jax_configs").iterdir())
    names = (name.removesuffix(".toml") for name in files if name.endswith(".toml"))
    # The rest are recipes of training.
    return sorted(name for name in names if not name.startswith("train_"))


@checked(name=TEXT)
def preset(name: str) -> ModelConfig:
    """A configuration that ships with the package.

    Raises:
      ValueError: no preset has this name; the message lists those there are.
    """
    return config_json.from_json(preset_json(name), where=f"preset '{name}'")


@checked(name=TEXT)
def preset_json(name: str) -> dict[str, Any]:
    """A preset in the spelling of `config.json`."""
    if name not in preset_names():
        raise ValueError(f"No preset '{name}'; there are {', '.join(preset_names())}.")
    return tomllib.loads(resources.files("v4jax_configs").joinpath(f"{name}.toml").read_text())
