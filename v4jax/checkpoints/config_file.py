"""A checkpoint's configuration: config.json, and what it leaves to the files beside it."""

from pathlib import Path
from typing import Any

from v4jax.checkpoints import disk, safetensors_directory
from v4jax.checkpoints.disk import CheckpointError
from v4jax.model import config_json
from v4jax.model.config import ModelConfig
from v4jax.text import chat

_GENERATION, _TOKENIZER = "generation_config.json", "tokenizer.json"
# Where transformers looks for the names of special tokens.
_NAMING = ("tokenizer_config.json", "special_tokens_map.json")


def read(file: Path) -> ModelConfig:
    """What a config.json says; see `config_json.from_json`."""
    return config_json.from_json(disk.read_json(file), where=str(file))


def end_tokens(directory: Path, cfg: ModelConfig) -> tuple[int, ...]:
    """The tokens that end a text: config.json's, else generation_config.json's or the tokenizer's.

    Without all of them there are none.

    Raises:
      CheckpointError: a file is no JSON object, or there is a tokenizer but no end of a text.
    """
    if cfg.eos_token_ids:
        return cfg.eos_token_ids
    vocab_size, generation = cfg.vocab_size, directory / _GENERATION
    told = _read(generation).get("eos_token_id")
    if told not in (None, []):
        return _checked(generation, told, vocab_size)
    file = directory / _TOKENIZER
    if not file.is_file():
        return ()
    from v4jax.text.tokenizer import Tokenizer

    token = _end_name(directory)
    number = Tokenizer.load(file).token_id(token)
    if number is None:
        raise CheckpointError(
            f"{file}: has no token {token!r}, and no other file says which token ends a text; add "
            f"eos_token_id to {directory / safetensors_directory.CONFIG}."
        )
    return _checked(file, number, vocab_size)


def _end_name(directory: Path) -> str:
    """The token that ends a text, as the tokenizer's files call it; else V4's own."""
    for file in (directory / name for name in _NAMING):
        token = _read(file).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
        if token is not None:
            raise CheckpointError(f"{file}: eos_token is {token!r:.100}; it must be a text.")
    return chat.EOS


def _checked(file: Path, told: Any, vocab_size: int) -> tuple[int, ...]:
    try:
        return config_json.end_tokens(told, vocab_size)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _read(file: Path) -> dict[str, Any]:
    return disk.read_json(file) if file.is_file() else {}
