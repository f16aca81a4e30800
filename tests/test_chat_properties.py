"""Properties of the chat encoding, for arbitrary messages."""

import copy

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_chat import TOOL, assistant, call, tool, user
from v4jax.text import chat
from v4jax.text.chat import END_THINK, EOS
from v4jax.text.chat import encode_chat as encode

TEXTS = st.sampled_from(["", "a", "b\n\nc", "\u65e5\u672c", "{x}"])
CALLS = st.lists(
    st.builds(call, st.sampled_from(["{}", '{"k": "v"}', "no"]), st.sampled_from(["a", "b", None])),
    max_size=3,
)
MESSAGES = st.lists(
    st.one_of(
        st.builds(user, TEXTS, task=st.sampled_from([None, None, "action", "title"])),
        st.builds(
            assistant, TEXTS, reasoning_content=TEXTS, tool_calls=CALLS, wo_eos=st.booleans()
        ),
        st.builds(tool, TEXTS, st.sampled_from(["a", "b", "x"])),
        st.builds(lambda text: {"role": "latest_reminder", "content": text}, TEXTS),
        st.builds(lambda text: {"role": "developer", "content": f"D{text}"}, TEXTS),
        st.builds(
            lambda text, tools: {"role": "system", "content": text, "tools": tools},
            TEXTS,
            st.sampled_from([[], [], [TOOL]]),
        ),
    ),
    min_size=1,
    max_size=7,
)
SETTINGS = st.fixed_dictionaries(
    {
        "thinking_mode": st.sampled_from(chat.THINKING_MODES),
        "reasoning_effort": st.sampled_from([None, "max"]),
        "drop_thinking": st.booleans(),
    }
)


@settings(deadline=None, max_examples=150)
@given(MESSAGES, SETTINGS)
def test_messages_are_never_mutated(messages, arguments):
    before = copy.deepcopy(messages)
    encode(messages, **arguments, context=messages)
    assert messages == before


@settings(deadline=None, max_examples=300)
@given(st.just([]) | MESSAGES, MESSAGES, SETTINGS)
def test_with_a_context_the_rest_of_the_text_is_encoded(context, messages, arguments):
    if messages[0]["role"] in ("user", "tool"):
        messages = [{"role": "latest_reminder", "content": "apart"}, *messages]
    whole = encode([*context, *messages], **arguments)
    rest = encode(messages, **arguments, context=context)
    assert whole.endswith(rest)
    written = [m["content"] for m in messages if m["role"] in ("assistant", "system")]
    assert all(text in rest for text in written)


@settings(deadline=None, max_examples=300)
@given(MESSAGES, MESSAGES, SETTINGS)
def test_segments_join_to_the_text_and_identify_their_author(context, messages, arguments):
    segments = chat.chat_segments(messages, **arguments, context=context)
    assert "".join(s.text for s in segments) == encode(messages, **arguments, context=context)
    written = [(s.message, s.reasoning, s.text) for s in segments if s.message is not None]
    for index, reasoning, text in written:
        message = messages[index]
        assert message["role"] == "assistant"
        if reasoning:
            assert text == message["reasoning_content"] + END_THINK
        else:
            assert text.startswith(message["content"])
            assert text.endswith(EOS) != message["wo_eos"]
    answers = [index for index, reasoning, _ in written if not reasoning]
    assert answers == [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    prompt = "".join(s.text for s in segments if s.message is None)
    assert EOS not in prompt
