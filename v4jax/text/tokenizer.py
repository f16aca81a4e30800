"""Text to token ids and back with a checkpoint's `tokenizer.json`, at once or streaming.

DeepSeek-V4 uses byte-level BPE: every token stands for bytes, and a character may span several
tokens. `v4jax.text.chat` writes the special tokens; none are added here.
"""

import codecs
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from v4jax import arguments
from v4jax.arguments import checked
from v4jax.text import chat
from v4jax.text.files import read_text

_TOKEN_ID = arguments.integer(0, 2**32 - 1)


class Tokenizer:
    """A byte-level BPE tokenizer that adds no special tokens."""

    @checked(
        inner=arguments.instance("a Tokenizer of the tokenizers library", tokenizers.Tokenizer)
    )
    def __init__(self, inner: tokenizers.Tokenizer):
        """Wrap a tokenizer of the `tokenizers` library.

        Raises:
          ValueError: its tokens do not stand for bytes.
        """
        if not isinstance(inner.decoder, tokenizers.decoders.ByteLevel):
            raise ValueError(
                f"The tokenizer's decoder is {inner.decoder}; DeepSeek-V4 uses byte-level BPE "
                "(decoder ByteLevel): use the tokenizer.json of a V4 checkpoint."
            )
        self._inner = inner

    @classmethod
    @checked(path=arguments.PATH)
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read `tokenizer.json` from its path or the checkpoint's directory.

        Raises:
          ValueError: there is no such file, or it is not a byte-level tokenizer.
        """
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(
                f"{file}: there is no such file; give the directory of a checkpoint with a "
                "tokenizer.json, or the file itself."
            )
        try:
            inner = tokenizers.Tokenizer.from_str(read_text(file))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f"{file}: not a tokenizer.json ({error}); copy the checkpoint's file again."
            ) from error
        inner.no_truncation()
        inner.no_padding()
        try:
            return cls(inner)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's embedding may have more rows."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a sentence, if there is one."""
        return self.token_id(chat.BOS)

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a sentence, if there is one."""
        return self.token_id(chat.EOS)

    @checked(token=arguments.TEXT)
    def token_id(self, token: str) -> int | None:
        """Id of a token by its name in the vocabulary, such as `chat.USER`; None if unknown."""
        return self._inner.token_to_id(token)

    @checked(token_id=_TOKEN_ID)
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for an id without a token."""
        token = self._inner.id_to_token(token_id)
        if token is None:
            return b""
        values = _byte_values()
        try:
            return bytes([values[char] for char in token])
        except KeyError:
            return token.encode()

    @checked(text=arguments.TEXT)
    def encode(self, text: str) -> list[int]:
        """Token ids of a text; each special token written in it becomes one id.

        Raises:
          ValueError: the text has half a surrogate pair, which UTF-8 cannot encode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text has half a surrogate pair at position {error.start}, which has no UTF-8 "
                "form; remove it or write the whole character."
            ) from None
        return self._inner.encode(text, add_special_tokens=False).ids

    @checked(ids=arguments.TOKEN_IDS)
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included; invalid UTF-8 becomes U+FFFD."""
        return self._inner.decode(ids, skip_special_tokens=False)


class StreamDecoder:
    """Decode token ids one at a time; the concatenated pieces equal `Tokenizer.decode` of all."""

    @checked(tokenizer=arguments.instance("a v4jax.text.tokenizer.Tokenizer", Tokenizer))
    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; a partial character is held back."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Return what is held back, as U+FFFD, and reset the decoder."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


@functools.cache
def byte_chars() -> tuple[str, ...]:
    """The printable character that stands for each byte in a vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(b if b in printable else next(others)) for b in range(256))


@functools.cache
def _byte_values() -> dict[str, int]:
    return {char: byte for byte, char in enumerate(byte_chars())}
