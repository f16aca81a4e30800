"""A tokenizer for the random checkpoints of demos and tests."""

import tokenizers

from v4jax import arguments
from v4jax.arguments import checked
from v4jax.text import chat
from v4jax.text.tokenizer import byte_chars

# Frequent words first: a smaller demo vocabulary uses a shorter prefix of the list.
_WORDS = """
the of and to in is you that it he was for on are as with his they at be this have from or one had
by word but not what all were we when your can said there use an each which she do how their if will
up other about out many then them these so some her would make like him into time has look two more
write go see number no way could people my than first water been call who its now find long down day
did get come made may part over new sound take only little work know place year live me back give
most very after thing our just name good sentence man think say great where help through much before
line right too mean old any same tell boy follow came want show also around form three small set put
end does another well large must big even such because turn here why ask went men read need land
different home us move try kind hand picture again change off play spell air away animal house point
page letter mother answer found study still learn should world model token question language train
"""


@checked(vocab_size=arguments.integer(0, 2**32 - 1))
def build_demo_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """A small tokenizer for demo checkpoints, built without any files; it round-trips any text.

    Its tokens are V4's special tokens (`chat.BOS` is 0 and `chat.EOS` 1, as in the released
    checkpoints), the 256 bytes, common English words, and placeholders that no text encodes to.

    Raises:
      ValueError: `vocab_size` is below 270, the number of special tokens and bytes.
    """
    basic = [*chat.SPECIAL_TOKENS, *byte_chars()]
    if vocab_size < len(basic):
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be {len(basic)} or more: "
            f"{len(chat.SPECIAL_TOKENS)} special tokens and 256 bytes."
        )
    vocab = {token: i for i, token in enumerate(basic)}
    merges = _add_words(vocab, vocab_size)
    for i in range(vocab_size - len(vocab)):
        vocab[f"<unused_{i}>"] = len(vocab)

    demo = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    demo.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    demo.decoder = tokenizers.decoders.ByteLevel()
    demo.add_special_tokens(
        [tokenizers.AddedToken(t, normalized=False, special=True) for t in chat.SPECIAL_TOKENS]
    )
    return demo


def _add_words(vocab: dict[str, int], limit: int) -> list[tuple[str, str]]:
    """Add each word, with a space before it, letter by letter while there is room."""
    merges: list[tuple[str, str]] = []
    for word in _WORDS.split():
        head = byte_chars()[ord(" ")]
        for char in word:
            if head + char not in vocab and len(vocab) < limit:
                vocab[head + char] = len(vocab)
                merges.append((head, char))
            head += char
    return merges
