"""Chats: the tokens of the tokenizer's own template, and nothing a user wrote is special."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import w2s_fast
from tests.support.drawn import drawn
from tests.support.tokenizers import byte_level, metaspace
from tests.text.chat_templates import KINDS, LLAMA, QWEN, SMOL
from w2s_fast import Chat
from w2s_fast.errors import InvalidRequest
from w2s_fast.text import PromptEncoder

ORDINARY = ["the", "ok", " ", "\n", "user", "a\u00e9", "<think>", "</think>\n", "<", "|>", "\u4e2d"]


def encoder(tokenizer: Any, template: str | None = None) -> PromptEncoder:
    if template is not None:
        tokenizer.chat_template = template
    return PromptEncoder("base", tokenizer, vocab_size=len(tokenizer), bos_token_id=None)


def expected(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    options = {"add_generation_prompt": True, **options}
    return list(tokenizer.apply_chat_template(messages, return_dict=False, **options))


def special_ids(tokenizer: Any) -> dict[int, str]:
    return {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def without_spaces(text: str) -> str:
    """What all decoders agree on."""
    return text.replace(" ", "")


ENCODERS = {name: encoder(kind.tokenizer) for name, kind in KINDS.items()}


@st.composite
def chats(draw: Any, name: str, spelling: bool) -> tuple[list[Any], list[Any]]:
    """Messages, and the same with a letter in place of all that looks like a special token."""
    tokens = list(special_ids(KINDS[name].tokenizer).values())
    pieces = [t[:2] for t in tokens] + [t[:-1] for t in tokens] + [t[1:] for t in tokens]
    odd = st.sampled_from([*pieces, *tokens] if spelling else pieces)
    content = st.lists(st.one_of(st.sampled_from(ORDINARY), st.tuples(odd)), max_size=6)
    contents = draw(st.lists(content, min_size=1, max_size=4))
    roles = ["user", "assistant"] * 2
    if draw(st.booleans()):
        roles.insert(0, "system")
        contents.insert(0, draw(content))
    real, harmless = [], []
    for role, parts in zip(roles, contents):
        real.append({"role": role, "content": "".join("".join(part) for part in parts)})
        plain = ["x" if isinstance(part, tuple) else part for part in parts]
        harmless.append({"role": role, "content": "".join(plain)})
    return real, harmless


@pytest.mark.parametrize("name", KINDS)
@drawn(15)
@given(data=st.data())
def test_tokens_are_those_of_apply_chat_template(name: str, data: Any) -> None:
    tokenizer = KINDS[name].tokenizer
    messages, _ = data.draw(chats(name, spelling=False))
    if any(t in m["content"] for t in special_ids(tokenizer).values() for m in messages):
        return  # put together from pieces
    before = copy.deepcopy(messages)
    assert ENCODERS[name].encode(messages) == expected(tokenizer, messages)
    assert messages == before


@pytest.mark.parametrize("name", KINDS)
@drawn(15)
@given(data=st.data())
def test_only_the_template_writes_special_tokens(name: str, data: Any) -> None:
    tokenizer, special = KINDS[name].tokenizer, special_ids(KINDS[name].tokenizer)
    messages, harmless = data.draw(chats(name, spelling=True))
    ids = ENCODERS[name].encode(messages)
    theirs = expected(tokenizer, harmless)
    assert [i for i in ids if i in special] == [i for i in theirs if i in special]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert without_spaces(tokenizer.decode(ids)) == without_spaces(text)


@pytest.mark.parametrize("scheme", ["first", "always", "never", "legacy"])
def test_around_what_a_user_spells_no_token_differs(scheme: str) -> None:
    """Where the special token is text, all is as with a token that is not there at all."""
    template = "<s>[INST] {% for m in messages %}{{ m.content }}[/INST] {% endfor %}"
    knows = metaspace("[INST]", "[/INST]", "<eot>", scheme=scheme)
    without = metaspace("[INST]", "[/INST]", scheme=scheme)
    without.chat_template = template
    for content in ("the <eot> end", "<eot>the", " <eot>", "the<eot><eot>"):
        messages = [{"role": "user", "content": content}]
        assert encoder(knows, template).encode(messages) == expected(without, messages)


EVERYTHING = "{{ messages | tojson }}{{ tools }}{{ x | default('') | tojson }}{{ y }}<eot>"


@pytest.mark.parametrize(
    "chat",
    [
        Chat([{"role": "<eot>", "content": "a"}]),
        Chat([{"role": "user", "content": "a", "name": "n<eot>"}]),
        Chat([{"role": "user", "content": "a", "<eot>": 1}]),
        Chat([{"role": "user", "content": [{"type": "text", "text": "<eot>"}]}]),
        Chat([{"role": "user", "thinking": "<eot>"}]),
        Chat([{"role": "user", "tool_calls": [{"function": {"<eot>": ("<eot>",)}}]}]),
        Chat([{"role": "user", "content": "a"}], tools=[{"parameters": {"<eot>": {}}}]),
        Chat([{"role": "user", "content": "a"}], tools=[{"description": "f\n<eot>"}]),
        Chat([{"role": "user", "content": "a"}], chat_template_kwargs={"x": {"<eot>": ["<eot>"]}}),
        Chat([{"role": "user", "content": "a"}], chat_template_kwargs={"y": "<EOT><eot>"}),
    ],
    ids=str,
)  # fmt: skip
def test_no_string_of_a_chat_becomes_a_special_token(chat: Chat) -> None:
    tokenizer = byte_level("<eot>")
    ids = encoder(tokenizer, EVERYTHING).encode(chat)
    eot = tokenizer.convert_tokens_to_ids("<eot>")
    assert ids.count(eot) == 1 and ids[-1] == eot
    text = tokenizer.apply_chat_template(
        chat.messages, chat.tools, tokenize=False, **(chat.chat_template_kwargs or {})
    )
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("{{ m.content | lower }}", "<EOT>a"),
        ("{{ m.content | upper | lower }}", "<eot>"),
        ("{{ m.content | replace('-', '') }}", "<e-ot>"),
        ("{{ m.content.split('!') | join }}", "<e!ot>"),
        ("<{{ m.content }}", "eot>"),
        ("{{ m.content }}>", "<eot"),
        ("{{ m.content[1:] }}", "a<eot>"),
        ("{{ m.content[:5] }}", "<eot>ab"),
        ("{{ m.content | length }}{{ m.content }}", "<eot>"),
        ("{{ m.content.split('<eot>') | join('|') }}{{ m.content }}", "a<eot>b"),
        ("{% if m.content.startswith('<eot>') %}{{ m.content }}{% endif %}", "<eot>b"),
        ("{{ m.content.split('<eot>')[-1].lstrip() + m.content }}", "a<eot>\n\nb"),
        ("{{ m.content | length }}{{ m.content if '<x>' in m.content }}", "<x><eot>"),
        ("{{ m }}", "'<eot>\"\\"),
        ("{{ m | tojson }}", "'<eot>\"\\"),
        ("{{ m.content | trim }}", "  <eot>  "),
    ],
)
def test_whatever_a_template_does_with_a_string_it_becomes_no_special_token(
    template: str, content: str
) -> None:
    tokenizer = byte_level("<eot>")
    whole = "<eot>{% for m in messages %}" + template + "\n<eot>{% endfor %}"
    messages = [{"role": "user", "content": content}]
    ids = encoder(tokenizer, whole).encode(messages)
    eot = tokenizer.convert_tokens_to_ids("<eot>")
    assert (ids.count(eot), ids[0], ids[-1]) == (2, eot, eot)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_where_it_cannot_be_told_whose_a_special_token_is_the_chat_is_refused() -> None:
    template = "{{ messages[0].content | urlencode }}<eot>"
    with pytest.raises(InvalidRequest, match="leaves open which special tokens"):
        encoder(byte_level("<eot>"), template).encode([{"role": "user", "content": "<eot>"}])


def test_special_tokens_that_read_their_surroundings_do_so_where_the_template_wrote_them() -> None:
    from tokenizers import AddedToken

    template = "{% for m in messages %}{{ m.content }} <eot>  {% endfor %}[x]end"
    for flags in ({"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}):
        tokens = [AddedToken("<eot>", special=True, **flags), AddedToken("[x]", special=True)]
        knows = byte_level(*tokens)
        without = byte_level(AddedToken("<\u16a0>", special=True, **flags), tokens[1])
        without.chat_template = template.replace("<eot>", "<\u16a0>")
        for content in ("the", " the  <eot> ok ", "a<eot>", "<eot>"):
            messages = [{"role": "user", "content": content}]
            assert encoder(knows, template).encode(messages) == expected(without, messages), flags


def test_tools_variables_and_thinking_reach_the_template() -> None:
    tokenizer = KINDS["qwen"].tokenizer
    messages = [{"role": "user", "content": "the end"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    ids = ENCODERS["qwen"].encode(Chat(messages, tools, {"enable_thinking": False}))
    assert ids == expected(tokenizer, messages, tools=tools, enable_thinking=False)
    assert len({tuple(ids), tuple(ENCODERS["qwen"].encode(messages))}) == 2

    def length(text: str) -> int:
        """How long a text is.

        Args:
            text: The text.
        """
        return len(text)

    assert ENCODERS["qwen"].encode(Chat(messages, [length])) == expected(
        tokenizer, messages, tools=[length]
    )
    calls = [*messages, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    assert ENCODERS["llama"].encode(calls) == expected(KINDS["llama"].tokenizer, calls)


def test_a_function_that_is_called_is_text_whatever_it_is_named() -> None:
    chat = Chat([{"role": "assistant", "tool_calls": [{"name": "<|eot|>"}]}])
    special = special_ids(KINDS["llama"].tokenizer)
    harmless = Chat([{"role": "assistant", "tool_calls": [{"name": "f"}]}])
    ours, theirs = ENCODERS["llama"].encode(chat), ENCODERS["llama"].encode(harmless)
    assert [i for i in ours if i in special] == [i for i in theirs if i in special]


@pytest.mark.parametrize("name", ["llama", "qwen", "smol", "zephyr"])
@pytest.mark.parametrize("answer", ["the ok", " ok ", "ok\n", "a<|im_end|>b</s>"])
def test_a_final_message_is_continued(name: str, answer: str) -> None:
    tokenizer, special = KINDS[name].tokenizer, special_ids(KINDS[name].tokenizer)
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": answer}]
    ids = ENCODERS[name].encode(Chat(messages, continue_final_message=True))
    options = {"continue_final_message": True, "add_generation_prompt": False}
    if not any(token in answer for token in special.values()):
        assert ids == expected(tokenizer, messages, **options)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert without_spaces(tokenizer.decode(ids)) == without_spaces(text)
    assert ids[-1] not in special


def test_contents_may_be_lists_of_parts() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "ok"}]},
        {"role": "user", "content": [{"type": "text", "text": t} for t in (" the ", "x")]},
    ]
    assert ENCODERS["gemma"].encode(messages) == expected(KINDS["gemma"].tokenizer, messages)


USER = [{"role": "user", "content": "a"}]
BAD: dict[str, Any] = {
    "no messages": Chat([]),
    "not messages": Chat("the"),  # type: ignore[arg-type]
    "one that is none": Chat([{"role": "user", "content": "a"}, 5]),  # type: ignore[list-item]
    "half a pair in a role": [{"role": "\ud800", "content": "a"}],
    "half a pair in a part": [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}],
    "half a pair in a key": [{"role": "user", "content": "a", "\udc00": 1}],
    "half a pair in a tool": Chat([{"role": "user", "content": "a"}], [{"name": "\udc00"}]),
    "half a pair in a variable": Chat(
        [{"role": "user", "content": "a"}], chat_template_kwargs={"x": ["\udc00"]}
    ),
    "a template of the caller's": Chat(
        [{"role": "user", "content": "a"}], chat_template_kwargs={"chat_template": "x"}
    ),
    "messages twice": Chat(USER, chat_template_kwargs={"messages": 1}),
    "a tool that is a number": Chat([{"role": "user", "content": "a"}], [5]),
    "an undocumented tool": Chat([{"role": "user", "content": "a"}], [lambda x: x]),
    "an object": [{"role": "user", "content": "a", "extra": object()}],
    "to continue a list": Chat(
        [{"role": "user", "tool_calls": []}], continue_final_message=True
    ),
    "to continue maybe": Chat([{"role": "user", "content": "a"}], continue_final_message="x"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_chat_that_cannot_be_used_is_refused(case: str) -> None:
    with pytest.raises(InvalidRequest):
        ENCODERS["smol"].encode(BAD[case])


def test_a_chat_nested_too_deeply_is_refused() -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    for content in (deep, {"x": deep}):
        with pytest.raises(InvalidRequest, match="deeply"):
            ENCODERS["smol"].encode([{"role": "user", "content": "a", "extra": content}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('not today') }}",
        "{{ messages.not_there.x }}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].append(1) }}",
        "{{ '\ud800' }}",
        "{{ messages.__class__.__mro__ }}{{ messages.x.y }}",
    ],
)
def test_a_template_that_fails_is_refused_by_name(template: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(InvalidRequest, match="the chat template of base") as caught:
        encoder(byte_level(), template).encode(messages)
    if "not today" in template:
        assert "not today" in str(caught.value)


def test_a_response_is_tokenised_behind_its_chat() -> None:
    tokenizer = metaspace("[INST]", "[/INST]")
    one = encoder(tokenizer, "<s>{% for m in messages %}{{ m.content }}{% endfor %}:")
    before, after = one.encode_with_response([{"role": "user", "content": "ok"}], "the</s>")
    assert tokenizer.convert_ids_to_tokens(before) == ["<s>", "ok", ":"]
    assert tokenizer.convert_ids_to_tokens(after) == ["the", "<", "/", "s", ">"]


def test_chat_is_public() -> None:
    assert w2s_fast.Chat is Chat and "Chat" in w2s_fast.__all__
    assert {LLAMA, QWEN, SMOL} <= {kind.tokenizer.chat_template for kind in KINDS.values()}
