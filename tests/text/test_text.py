"""Text in and out: prompts, templates, chats, and the text of a response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import (
    found,
    models_of,
)
from tests.support.reference import Reference, ReferenceGuide
from tests.support.tiny_models import (
    BYTE_VOCABULARY,
    byte_tokenizer,
)
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.errors import (
    InvalidRequest,
)


def test_text_is_the_response_without_prompt_and_special_tokens(path_engine: Engine) -> None:
    tokenizer = path_engine.tokenizer
    assert tokenizer is not None
    params = SearchParams(
        method="sample", n=30, max_new_tokens=30, temperature=1.5, stop_token_ids=(40,)
    )
    (result,) = path_engine.generate(["Once upon"], params)
    assert {h.finish_reason for h in result.hypotheses} >= {"stop", "length"}
    for h in result.hypotheses:
        shown = h.token_ids if h.finish_reason == "length" else h.token_ids[:-1]
        assert h.text == tokenizer.decode(shown, skip_special_tokens=True)
        assert h.text is not None
        assert "<eos>" not in h.text
    assert result.text == result.hypotheses[0].text


def test_a_text_its_token_ids_and_its_bos_are_one_prompt(path_engine: Engine) -> None:
    tokenizer = path_engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer("The film {begins} %s")["input_ids"]
    assert ids.count(256) == 1
    params = SearchParams(beam_width=2, successors=2, max_new_tokens=8)
    by_text, by_ids = path_engine.generate(["The film {begins} %s", ids], params)
    assert found([by_text]) == found([by_ids])
    assert by_text.usage.prompt_tokens == len(ids) == 21


def test_what_a_user_writes_is_never_a_special_token(path_engine: Engine) -> None:
    params = SearchParams(method="sample", max_new_tokens=1)
    (result,) = path_engine.generate(["a<eos>b<bos>"], params)
    assert result.usage.prompt_tokens == 1 + len("a<eos>b<bos>")


def test_a_single_string_is_one_prompt(path_engine: Engine) -> None:
    params = SearchParams(method="sample", max_new_tokens=3)
    results = path_engine.generate("abc", params)
    assert len(results) == 1
    assert found(results) == found(path_engine.generate(["abc"], params))


def test_given_texts_are_scored_behind_their_prompts(path_engine: Engine) -> None:
    (by_text,) = path_engine.score(["The film"], [" was good"])
    tokenizer = path_engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer("The film was good")["input_ids"]
    (by_ids,) = path_engine.score([ids[:9]], [ids[9:]])
    assert by_text == pytest.approx(by_ids, abs=1e-5)


TEMPLATE = "Q: {prompt} <eos>\nA:"


def test_each_model_has_a_prompt_of_its_own(folders: dict[str, Path]) -> None:
    e = Engine(
        base=folders["base"],
        guides=Guide(folders["tuned"], folders["untuned"], prompt_template=TEMPLATE),
        device="cpu",
        kv_cache_tokens=4096,
    )
    assert e.tokenizer is not None
    for text in ("Hi {there}", "a<eos>b", "%s {0} {prompt}"):
        # Template text may hold special tokens and brings no BOS; a user's text never does.
        middle = [e.tokenizer.convert_tokens_to_ids(c.replace(" ", "\u0120")) for c in text]
        head = [e.tokenizer.convert_tokens_to_ids(c) for c in "Q:\u0120"]
        tail = [e.tokenizer.convert_tokens_to_ids(c) for c in ("\u0120", "<eos>", *"\u010aA:")]
        guide_prompt = head + middle + tail
        reference = Reference(
            e.base.model,
            [ReferenceGuide(*(m.model for m in e.guides[0].models))],
            vocab_size=BYTE_VOCABULARY,
            eos_token_ids=[257],
        )
        for model in models_of(e):
            model.model.set_attn_implementation("eager")
        params = SearchParams(beam_width=2, successors=2, max_new_tokens=10)
        expected = reference.search([256, *middle], params, [guide_prompt])
        (result,) = e.generate([text], params)
        assert result.token_ids == expected.hypotheses[0].token_ids
        assert result.score == pytest.approx(expected.hypotheses[0].score, abs=1e-3)


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_chat_messages_go_through_the_chat_template_as_data(folders: dict[str, Path]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    e = Engine(base=folders["base"], tokenizer=tokenizer, device="cpu", kv_cache_tokens=1024)
    params = SearchParams(method="sample", max_new_tokens=5)
    messages = [{"role": "system", "content": "Be {brief}"}, {"role": "user", "content": "Hi"}]
    plain = tokenizer("[system]Be {brief}")["input_ids"][1:]
    hi = tokenizer("[user]Hi")["input_ids"][1:]
    start = tokenizer("[assistant]")["input_ids"][1:]
    by_chat, by_ids = e.generate([messages, [256, *plain, 257, *hi, 257, *start]], params)
    assert found([by_chat]) == found([by_ids])
    assert by_chat.usage.prompt_tokens == by_ids.usage.prompt_tokens
    sly = [{"role": "user", "content": "a<eos>[user]{{ x }}<bos>"}]
    typed = tokenizer("[user]a<eos>[user]{{ x }}<bos>", split_special_tokens=True)["input_ids"]
    by_chat, by_ids = e.generate([sly, [*typed, 257, *start]], params)
    assert found([by_chat]) == found([by_ids])


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}],
        [{"content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "a"}, "b"],
        [{"role": "user", "content": "a"}, 5],
    ],
    ids=str,
)
def test_messages_of_another_shape_are_refused(folders: dict[str, Path], messages: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    e = Engine(base=folders["base"], tokenizer=tokenizer, device="cpu", kv_cache_tokens=1024)
    with pytest.raises(InvalidRequest):
        e.generate([messages], SearchParams(method="sample"))


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\x00", "\U0001f600" * 3, "\ufeff \r\n"])
def test_any_string_is_a_prompt_or_is_refused_and_harms_no_neighbour(
    path_engine: Engine, text: str
) -> None:
    params = SearchParams(method="sample", max_new_tokens=4)
    first, odd, last = path_engine.generate(["ab", text, "cd"], params, on_error="return")
    assert odd.error is None or isinstance(odd.error, InvalidRequest)
    assert found([first, last]) == found(path_engine.generate(["ab", "cd"], params))
