"""Growing texts have the tokens of the whole, in any script, whatever the tokenizer is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from tests.support.trained_tokenizers import (
    BETWEEN,
    KINDS,
    WORDS,
    drawn_text,
    trained,
    trained_on,
)
from w2s_fast.errors import InvalidRequest
from w2s_fast.text import GrowingTexts, PromptEncoder, Said, Translator, decode_response
from w2s_fast.text.special_tokens import common_prefix
from w2s_fast.text.translation import Grown

ROOT = Path(__file__).parents[2]
LAST = "\ufffd"


def encoder(kind: str, template: str | None = None, **options: Any) -> PromptEncoder:
    tokenizer = trained(kind)
    options = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, **options}
    return PromptEncoder("guide", tokenizer, template, **options)


def grow(
    translator: Translator, own: PromptEncoder, prompt: str, pieces: Sequence[str]
) -> list[Grown]:
    """A response piece by piece, after each compared with the whole."""
    written = own.as_text(prompt)
    text = translator.begin(written)
    before = own.encode(prompt)
    assert text.ids.tolist() == before
    found = []
    response = ""
    for piece in pieces:
        response += piece
        (grown,) = translator.extend([text], [response])
        assert isinstance(grown, Grown)
        whole = own._need_texts().encode(written.followed_by(response))
        start = common_prefix(before, whole)
        if start == 0:
            whole, start = [own.bos_token_id or 0, *whole], 1
        assert grown.text.ids.tolist() == whole
        assert grown.text.start == start
        assert grown.common == common_prefix(text.ids.tolist(), whole)
        text = grown.text
        found.append(grown)
    return found


def cut(text: str, lengths: Sequence[int]) -> list[str]:
    """A text in pieces of these lengths, and what is left."""
    pieces = []
    for length in lengths:
        pieces.append(text[:length])
        text = text[length:]
    return [piece for piece in [*pieces, text] if piece]


texts = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(WORDS), st.sampled_from(BETWEEN)).map("".join),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    ),
    min_size=1,
    max_size=12,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(
    prompt=texts,
    response=texts,
    lengths=st.lists(st.integers(1, 9), max_size=20),
    template=st.sampled_from([None, "{prompt}\n", "<s>user\n{prompt}</s>\n", "Q: {prompt} A:"]),
)
@drawn(30)
def test_growing_texts_have_the_tokens_of_the_whole(
    kind: str, prompt: str, response: str, lengths: list[int], template: str | None
) -> None:
    own = encoder(kind, template)
    grow(own.translator(), own, prompt, cut(response, lengths))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_end_of_a_text_is_encoded_again(kind: str) -> None:
    own = encoder(kind)
    translator = own.translator()
    assert translator._pieces is not None
    drawing = random.Random(7)
    longest, encode = 0, translator._pieces.encode

    def watched(pieces: Sequence[str]) -> Any:
        nonlocal longest
        longest = max(longest, *map(len, pieces))
        return encode(pieces)

    text = " ".join(drawn_text(drawing, 3) for _ in range(60))
    with mock.patch.object(translator._pieces, "encode", watched):
        grow(translator, own, "the film was", [text[i : i + 5] for i in range(0, len(text), 5)])
    assert len(text) > 1000
    assert 5 < longest < 200


def test_many_texts_are_encoded_in_one_call() -> None:
    own = encoder("bytes-gpt2")
    translator = own.translator()
    assert translator._pieces is not None
    drawing = random.Random(3)
    prompts = [drawn_text(drawing, 5) for _ in range(300)]
    responses = [drawn_text(drawing, 6) for _ in prompts]
    begun = [translator.begin(own.as_text(prompt)) for prompt in prompts]
    backend = translator._pieces._backend
    with mock.patch.object(translator._pieces, "_backend") as watched:
        watched.encode_batch_fast.side_effect = backend.encode_batch_fast
        found = translator.extend(begun, responses)
    assert watched.encode_batch_fast.call_count <= 2  # and once for characters that are new
    for prompt, response, grown in zip(prompts, responses, found, strict=True):
        assert isinstance(grown, Grown)
        assert grown.text.ids.tolist() == own.encode(prompt + response)


def test_a_prompt_may_be_empty() -> None:
    own = encoder("bytes-gpt2")  # which puts no BOS before a text
    grown = grow(own.translator(), own, "", ["he", "llo wor", "ld again"])
    assert grown[-1].text.ids[0] == own.bos_token_id
    assert grown[-1].text.start == 1
    without = encoder("bytes-gpt2", bos_token_id=None)
    with pytest.raises(InvalidRequest, match="no BOS"):
        without.translator().begin(without.as_text(""))


def test_a_response_may_take_the_whole_prompt_into_its_first_token() -> None:
    own = encoder("bytes-gpt2")
    assert len(own.encode("the")) == 1
    grown = grow(own.translator(), own, "th", ["e", " film"])
    assert grown[0].text.ids.tolist() == [own.bos_token_id, *own.encode("the")]
    without = encoder("bytes-gpt2", bos_token_id=None)
    text = without.translator().begin(without.as_text("th"))
    (found,) = without.translator().extend([text], ["e"])
    assert isinstance(found, InvalidRequest)


def test_a_text_that_was_taken_back_is_encoded_anew() -> None:
    own = encoder("bytes-llama3")
    translator = own.translator()
    text = translator.begin(own.as_text("hello world"))
    (first,) = translator.extend([text], [" the film was wonderful"])
    assert isinstance(first, Grown)
    (second,) = translator.extend([first.text], [" the film is"])
    assert isinstance(second, Grown)
    assert second.text.ids.tolist() == own.encode("hello world the film is")
    assert 0 < second.common < len(second.text.ids)


def test_tokens_that_the_models_do_not_have_are_refused() -> None:
    own = encoder("bytes-gpt2")
    few = encoder("bytes-gpt2", vocab_size=300, own_vocab_size=len(own.tokenizer or ()))
    translator = few.translator()
    text = translator.begin(few.as_text("qz"))
    first, second = translator.extend([text, text], [" zq", " the"])
    assert isinstance(first, Grown)
    assert isinstance(second, InvalidRequest)
    assert "below 300" in str(second)


def test_responses_spell_no_special_tokens() -> None:
    own = encoder("bytes-gpt2")
    tokenizer = own.tokenizer
    assert tokenizer is not None
    grown = grow(own.translator(), own, "a", [" b</", "s> c", " d <s", ">"])
    assert tokenizer.eos_token_id not in grown[-1].text.ids
    assert decode_response(tokenizer, [], grown[-1].text.ids.tolist()) == "a b</s> c d <s>"


@pytest.mark.parametrize(("tokens", "limit"), [(5, 1.6), (30, 1.15)])
@pytest.mark.parametrize("kind", KINDS)
def test_little_is_run_again(kind: str, tokens: int, limit: float) -> None:
    text = (ROOT / "README.md").read_text()
    base, guide = trained_on("bytes-gpt2", text, 1500), trained_on(kind, text, 1500)
    ids = base(text[:6000])["input_ids"]
    own = PromptEncoder("guide", guide, vocab_size=len(guide), bos_token_id=None)
    translator = own.translator()
    known = translator.begin(own.as_text("Tell me about it:\n"))
    listener, said = GrowingTexts(base), Said()
    run = new = 0
    for end in range(tokens, len(ids), tokens):
        (heard,) = listener.extend([([1], ids[:end], said, False)])
        assert isinstance(heard, Said)
        (grown,) = translator.extend([known], [heard.text])
        assert isinstance(grown, Grown)
        run += len(grown.text.ids) - grown.common
        new += len(grown.text.ids) - len(known.ids)
        known, said = grown.text, heard
    print(f"{kind}, chunks of {tokens}: {run} tokens run for {new} new ones, {run / new:.3f} x")
    assert run <= limit * new


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, prompt=texts, lengths=st.lists(st.integers(1, 7), min_size=1))
@drawn(30)
def test_what_is_said_grows_to_the_whole(
    kind: str, text: str, prompt: str, lengths: list[int]
) -> None:
    tokenizer = trained(kind)
    before = tokenizer(prompt)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    listener, said, end = GrowingTexts(tokenizer), Said(), 0
    for length in [*lengths, len(ids)]:
        end += length
        (heard,) = listener.extend([(before, ids[:end], said, False)])
        assert isinstance(heard, Said)
        assert heard.text.startswith(said.text)
        assert decode_response(tokenizer, before, ids).startswith(heard.text) or kind == "wordpiece"
        said = heard
    (last,) = listener.extend([(before, ids, said, True)])
    assert isinstance(last, Said)
    assert last.text == decode_response(tokenizer, before, ids)
    if kind != "wordpiece":  # whose decoder takes back the space before a mark
        assert said.text == last.text.rstrip(LAST) or tokenizer.convert_ids_to_tokens(
            ids[-1]
        ).startswith("<0x")


def test_a_character_is_said_when_it_is_whole() -> None:
    tokenizer = trained("bpe-first")
    ids = tokenizer("\u7fe0 a", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[1:4] == ["<0xE7>", "<0xBF>", "<0xA0>"]
    listener, said = GrowingTexts(tokenizer), Said()
    heard = []
    for end in range(1, len(ids) + 1):
        (said,) = listener.extend([([1], ids[:end], said, False)])  # type: ignore[assignment]
        heard.append(said.text)
    assert heard[:5] == ["", "", "", "\u7fe0", "\u7fe0 a"]
    (cut_off,) = listener.extend([([1], ids[:3], Said(), True)])
    assert isinstance(cut_off, Said)
    assert cut_off.text.endswith(LAST)


def test_a_tokenizer_that_fails_on_one_text_fails_for_it_alone() -> None:
    tokenizer = trained("bytes-gpt2")
    listener = GrowingTexts(tokenizer)
    good = tokenizer("hello world")["input_ids"]
    found = listener.extend([([1], good, Said(), False), ([1], [-1], Said(), False)])
    assert isinstance(found[0], Said)
    assert found[0].text == "hello world"
    assert isinstance(found[1], Exception)
