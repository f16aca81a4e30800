"""The tokenizer, its streaming decoder, and the demo vocabulary."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.text import chat
from v4jax.text.demo_tokenizer import build_demo_tokenizer
from v4jax.text.tokenizer import StreamDecoder, Tokenizer

SIZES = [270, 271, 300, 1024, 2048]
DEMO = Tokenizer(build_demo_tokenizer(1024))
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from([*chat.SPECIAL_TOKENS, " the", "<unused_1>", "\U0001f30d", "\u4f60\n\n"]),
    ),
    max_size=6,
).map("".join)


@pytest.fixture
def saved(tmp_path):
    """A directory with the demo vocabulary's tokenizer.json."""
    build_demo_tokenizer(400).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("size", SIZES)
def test_the_demo_vocabulary_has_the_requested_size_and_no_gaps(size):
    demo = build_demo_tokenizer(size)
    assert demo.get_vocab_size() == size
    assert sorted(demo.get_vocab().values()) == list(range(size))


def test_a_demo_vocabulary_that_is_too_small_is_rejected():
    with pytest.raises(ValueError, match="vocab_size is 269; it must be 270 or more"):
        build_demo_tokenizer(269)


@pytest.mark.parametrize("token", chat.SPECIAL_TOKENS)
def test_every_special_token_is_one_token(token):
    assert DEMO.encode(f"a{token}b") == [*DEMO.encode("a"), DEMO.token_id(token), *DEMO.encode("b")]
    assert DEMO.token_bytes(DEMO.encode(token)[0]) == token.encode()


def test_bos_is_0_and_eos_is_1_and_neither_is_added():
    assert (DEMO.bos_id, DEMO.eos_id) == (0, 1)
    assert DEMO.encode("") == []
    prompt = chat.encode_chat([{"role": "user", "content": "the"}])
    assert DEMO.encode(prompt)[0] == 0
    assert DEMO.encode(prompt).count(0) == 1
    assert DEMO.token_id("no such token") is None


def test_a_tokenizer_without_special_tokens_has_no_bos_and_no_eos():
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    bare.decoder = tokenizers.decoders.ByteLevel()
    assert (Tokenizer(bare).bos_id, Tokenizer(bare).eos_id, Tokenizer(bare).vocab_size) == (
        None,
        None,
        1,
    )


def test_common_words_are_single_tokens():
    assert len(DEMO.encode(" the model said that people should learn language")) == 8


def test_a_demo_vocabulary_may_be_as_large_as_the_released_one():
    assert Tokenizer(build_demo_tokenizer(129_280)).vocab_size == 129_280


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(SIZES), TEXTS)
def test_any_text_round_trips(size, text):
    tokenizer = Tokenizer(build_demo_tokenizer(size)) if size < 300 else DEMO
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@settings(deadline=None, max_examples=200)
@given(TEXTS)
def test_streamed_pieces_are_complete_characters_and_add_up_to_the_text(text):
    stream = StreamDecoder(DEMO)
    pieces = [stream.push(i) for i in DEMO.encode(text)]
    assert stream.flush() == ""
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 1100), max_size=12))
def test_streaming_any_ids_equals_decoding_them_at_once(ids):
    stream = StreamDecoder(DEMO)
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.flush()]) == DEMO.decode(ids)


def test_bytes_that_are_not_utf8_become_replacement_characters():
    first, second = (DEMO.encode("\u00e9")[i] for i in (0, 1))
    stream = StreamDecoder(DEMO)
    assert (stream.push(first), stream.push(second)) == ("", "\u00e9")
    assert (stream.push(first), stream.flush()) == ("", "\ufffd")
    assert stream.push(second) == "\ufffd" == DEMO.decode([second])


def test_ids_without_a_token_decode_to_nothing():
    assert DEMO.decode([1024, 5_000_000]) == StreamDecoder(DEMO).push(5_000_000) == ""


def test_half_a_surrogate_pair_is_rejected_with_its_position():
    with pytest.raises(ValueError, match="half a surrogate pair at position 2"):
        DEMO.encode("ab\ud83d")


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_a_saved_tokenizer_loads_from_its_directory_or_file(saved, name):
    loaded = Tokenizer.load(saved / name)
    assert loaded.vocab_size == 400
    assert loaded.encode("the end\u2026") == Tokenizer(build_demo_tokenizer(400)).encode(
        "the end\u2026"
    )


def test_truncation_and_padding_in_the_file_are_disabled(saved):
    inner = build_demo_tokenizer(400)
    inner.enable_truncation(2)
    inner.enable_padding(length=64)
    inner.save(str(saved / "tokenizer.json"))
    assert len(Tokenizer.load(saved).encode("\u4f60\u4f60")) == 6


def test_a_template_in_the_file_adds_no_tokens(saved):
    inner = build_demo_tokenizer(400)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{chat.BOS} $A", special_tokens=[(chat.BOS, 0)]
    )
    inner.save(str(saved / "tokenizer.json"))
    assert 0 not in Tokenizer.load(saved).encode("a")


@pytest.mark.parametrize("name", ["", "other.json"])
def test_the_error_for_a_missing_file_names_it_and_says_what_to_do(tmp_path, name):
    with pytest.raises(
        ValueError, match=r"\.json: there is no such file; give the directory"
    ) as error:
        Tokenizer.load(tmp_path / name)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", json.dumps({"model": {"type": "BPE"}})])
def test_the_error_for_a_broken_file_names_it_and_says_what_to_do(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: not a tokenizer\.json \(.+copy the che"
    ):
        Tokenizer.load(tmp_path)


def test_a_binary_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_rejected(tmp_path):
    file = tmp_path / "words.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(file))
    with pytest.raises(ValueError, match=r"words\.json: .*byte-level BPE"):
        Tokenizer.load(str(file))
