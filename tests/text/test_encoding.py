"""Strings to tokens: no token that nobody wrote, and a tokenizer's errors are one request's."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, pre_tokenizers

from tests.support.engines import found
from tests.support.tiny_models import byte_tokenizer, tiny_model
from tests.support.tokenizers import byte_level, metaspace, unigram, with_gaps, words
from w2s_fast import Chat, Engine, Guide, SearchParams
from w2s_fast.errors import InvalidRequest
from w2s_fast.text import PromptEncoder

SCHEMES = ["first", "always", "never", "legacy"]


def encoder(tokenizer: Any, template: str | None = None, **options: Any) -> PromptEncoder:
    options = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, **options}
    return PromptEncoder("base", tokenizer, template, **options)


def tokens_of(tokenizer: Any, ids: list[int]) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("text", ["the user", " the", "a</s>b", "</s>", "x</s> the"])
def test_around_a_text_a_template_brings_no_space_of_its_own(scheme: str, text: str) -> None:
    """All as in one string; what spells a token, as if another sign stood in it."""
    tokenizer = metaspace(scheme=scheme)
    ours = tokens_of(tokenizer, encoder(tokenizer, "ok:{prompt}</s>\nend").encode(text))
    other = "ok:" + text.replace("</s>", "</\u2502>") + "</s>\nend"
    theirs = tokens_of(tokenizer, tokenizer(other, add_special_tokens=False)["input_ids"])
    assert " ".join(ours) == " ".join(theirs).replace("<0xE2> <0x94> <0x82>", "s")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_response_behind_tokens_begins_as_it_is_written(scheme: str) -> None:
    tokenizer = metaspace(scheme=scheme)
    prompts: list[tuple[Any, str | None]] = [([1, 300], None), ("x", "ok:{prompt}")]
    for prompt, template in prompts:
        one = encoder(tokenizer, template)
        for text, expected in (
            ("the", ["the"]),
            (" the", ["\u2581the"]),
            ("\nok", ["<0x0A>", "ok"]),
            ("a</s>", ["a", "<", "/", "s", ">"]),
        ):
            assert tokens_of(tokenizer, one.encode_with_response(prompt, text)[1]) == expected


@pytest.mark.parametrize("prompt", ["the user", "", "the</s>"])
def test_a_text_goes_on_where_the_tokenizer_would_end_it(prompt: str) -> None:
    tokenizer = unigram()
    one = encoder(tokenizer, bos_token_id=1)
    assert 0 not in one.encode(prompt)
    for response in ("the", " ok</s>"):
        before, after = one.encode_with_response(prompt, response)
        assert 0 not in [*before, *after]
        assert before == one.encode(prompt)
    assert tokens_of(tokenizer, one.encode("the")) == ["\u2581the"]


def test_an_empty_text_is_the_bos_and_nothing_else() -> None:
    from tokenizers import processors

    tokenizer = metaspace()
    assert encoder(tokenizer).encode("") == [1]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert encoder(tokenizer).encode("") == [1]
    assert encoder(tokenizer).encode("the</s>")[-1] == tokenizer.convert_tokens_to_ids(">")
    assert encoder(tokenizer).encode("the") == [1, *tokenizer("the")["input_ids"][1:-1]]
    with pytest.raises(InvalidRequest, match="no BOS"):
        encoder(unigram()).encode("")


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (unigram(), "a</s>b"),  # it stands among the pieces
        (words(AddedToken("[eot]", special=True)), "the [eot] end"),
        (words(AddedToken("eot", special=True, normalized=True)), "the EOT end"),
        (words(AddedToken("[eot]", special=True, normalized=True)), "[EoT]"),
        (byte_level(AddedToken("<eot>", special=True, lstrip=True)), "a  <eot>"),
    ],
)
def test_no_text_spells_a_special_token(tokenizer: Any, text: str) -> None:
    known = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    known -= {tokenizer.unk_token_id}
    assert known & set(tokenizer(text)["input_ids"])
    assert not known & set(encoder(tokenizer).encode(text))
    assert not known & set(encoder(tokenizer, "the {prompt}").encode(text))
    assert not known & set(encoder(tokenizer).encode_with_response([2], text)[1])


def test_a_special_token_is_not_joined_from_a_template_and_a_text() -> None:
    tokenizer = byte_level("<eot>")
    eot = tokenizer.convert_tokens_to_ids("<eot>")
    assert eot not in encoder(tokenizer, "<{prompt}").encode("eot>")
    assert eot not in encoder(tokenizer).encode_with_response("a<", "eot>")[1]
    assert encoder(tokenizer, "<eot>{prompt}<eot>").encode("<eot>").count(eot) == 2


def test_a_tokenizer_that_cannot_be_copied_encodes_piece_by_piece() -> None:
    class Own:
        def pre_tokenize(self, pretok: Any) -> None:
            return None

    tokenizer = byte_level("<eot>", eos_token="<eos>")
    plain = encoder(tokenizer, "the {prompt}<eot>").encode("a<eot>b")
    own = pre_tokenizers.PreTokenizer.custom(Own())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), own]
    )
    with pytest.raises(Exception, match="PreTokenizer"):
        tokenizer.backend_tokenizer.to_str()
    assert encoder(tokenizer, "the {prompt}<eot>").encode("a<eot>b") == plain


def with_extra_token() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])  # behind all that the models have
    tokenizer.chat_template = "{{ messages[0].content }}{{ x }}"
    return tokenizer


def served(tokenizer: Any) -> Engine:
    base, guide = (tiny_model("llama", seed=s, vocab_size=258, eos=(257,)) for s in (0, 1))
    return Engine(base, Guide(guide, base), tokenizer=tokenizer, device="cpu", kv_cache_tokens=1024)


HALF = "\ud83d"
USER = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("a<extra>", "'<extra>'"),
        ([{"role": "user", "content": "<extra>"}], "'<extra>'"),
        (Chat(USER, chat_template_kwargs={"x": "<extra>"}), "'<extra>'"),
        ([97, 258], "258"),
        ("a" + HALF, "a prompt"),
        ([{"role": "user", "content": HALF}], r"messages\[0\]\['content'\]"),
        ([{"role": "user" + HALF, "content": "a"}], r"messages\[0\]\['role'\]"),
        (Chat(USER, tools=[{"name": HALF}]), r"tools\[0\]\['name'\]"),
        (Chat(USER, chat_template_kwargs={"x": [HALF]}), r"chat_template_kwargs\['x'\]\[0\]"),
    ],
    ids=repr,
)
def test_what_cannot_be_encoded_is_one_requests_error(prompt: Any, names: str) -> None:
    e = served(with_extra_token())
    params = SearchParams(method="sample", max_new_tokens=3)
    first, odd, last = e.generate(["ab", prompt, "cd"], params, on_error="return")
    with pytest.raises(InvalidRequest, match=names):
        raise odd.error or AssertionError("it was answered")
    assert found([first, last]) == found(e.generate(["ab", "cd"], params))


def test_a_character_without_a_token_is_one_requests_error() -> None:
    one = encoder(unigram(unknown=False), "the {prompt}")
    with pytest.raises(InvalidRequest, match="the tokenizer of base cannot encode"):
        one.encode("\u4e2d")
    with pytest.raises(InvalidRequest, match="the tokenizer of base cannot encode"):
        one.encode("</s>\u4e2d")
    assert tokens_of(one.tokenizer, one.encode_with_response([1], "the")[1]) == ["the"]


@pytest.mark.parametrize(
    "response", ["a" + HALF, "<extra>", [258], [-1], [True], 5, None, b"a", ""]
)
@pytest.mark.parametrize("prompt", ["a", [97], [{"role": "user", "content": "a"}]], ids=str)
def test_a_response_that_cannot_be_scored_is_refused(prompt: Any, response: Any) -> None:
    with pytest.raises(InvalidRequest):
        encoder(with_extra_token(), vocab_size=258).encode_with_response(prompt, response)


@pytest.mark.parametrize("template", ["a" + HALF + "{prompt}", "a", 5, "{prompt}{prompt}"])
def test_a_template_that_cannot_be_used_is_refused(template: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt_template of base"):
        encoder(byte_tokenizer(), template)


def test_ids_that_are_no_tokens_are_refused() -> None:
    one = encoder(with_gaps(byte_tokenizer(), 70, 200), vocab_size=258)
    for ids in ([97, 70], [97, 200]):
        with pytest.raises(InvalidRequest, match="is no token"):
            one.encode(ids)
        with pytest.raises(InvalidRequest, match="is no token"):
            one.encode_with_response("a", ids)
    assert one.encode([97, 71]) == [97, 71]
