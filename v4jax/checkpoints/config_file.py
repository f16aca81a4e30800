"""A checkpoint's configuration: config.json, and what it leaves to the files next to it."""

from pathlib import Path
from typing import Any

from v4jax.checkpoints import disk, safetensors_directory
from v4jax.checkpoints.disk import CheckpointError
from v4jax.model import config_json
from v4jax.model.config import ModelConfig
from v4jax.text import chat

_GENERATION, _TOKENIZER = "generation_config.json", "tokenizer.json"
# Where transformers looks for the names of special tokens.
_TOKEN_NAMES = ("tokenizer_config.json", "special_tokens_map.json")


def read(file: Path) -> ModelConfig:
    """Read a config.json; see `config_json.from_json`."""
    return config_json.from_json(disk.read_json(file), where=str(file))


def end_tokens(directory: Path, cfg: ModelConfig) -> tuple[int, ...]:
    """The tokens that end a text: config.json's, else generation_config.json's or the tokenizer's.

    Empty if none of these files exists or sets one.

    Raises:
      CheckpointError: a file is not a JSON object, a token is not in the vocabulary, or the
        tokenizer lacks the token that ends a text.
    """
    if cfg.eos_token_ids:
        return cfg.eos_token_ids
    vocab_size, generation = cfg.vocab_size, directory / _GENERATION
    eos = _read(generation).get("eos_token_id")
    if eos not in (None, []):
        return _checked(generation, eos, vocab_size)
    file = directory / _TOKENIZER
    if not file.is_file():
        return ()
    from v4jax.text.tokenizer import Tokenizer

    token = _end_name(directory)
    token_id = Tokenizer.load(file).token_id(token)
    if token_id is None:
        raise CheckpointError(
            f"{file}: has no token {token!r}, and no other file sets the end-of-text token; add "
            f"eos_token_id to {directory / safetensors_directory.CONFIG}."
        )
    return _checked(file, token_id, vocab_size)


def _end_name(directory: Path) -> str:
    """The name of the end-of-text token in the tokenizer's files; V4's own by default."""
    for file in (directory / name for name in _TOKEN_NAMES):
        token = _read(file).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
        if token is not None:
            raise CheckpointError(f"{file}: eos_token is {token!r:.100}; it must be a string.")
    return chat.EOS


def _checked(file: Path, eos: Any, vocab_size: int) -> tuple[int, ...]:
    try:
        return config_json.end_tokens(eos, vocab_size)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _read(file: Path) -> dict[str, Any]:
    return disk.read_json(file) if file.is_file() else {}
