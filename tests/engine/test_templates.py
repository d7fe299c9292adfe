"""Each model's prompt comes from its own template, tokenizer and BOS; a response is one for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import models, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.engines import models_of
from tests.support.reference import Reference, ReferenceGuide
from tests.support.tiny_models import BYTE_VOCABULARY, byte_tokenizer, save_tiny, tiny_triple
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.errors import InvalidRequest, MismatchedVocabulary
from w2s_fast.text import check_same_vocabulary

BOS, EOS = 256, 257
SHORT = SearchParams(beam_width=2, successors=2, chunk_length=3, max_new_tokens=8)


def ids(text: str) -> list[int]:
    """Bytes, and no BOS."""
    found: list[int] = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return found


def adding_no_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


def merging(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """One that knows the token ab, which takes the place of the second last byte."""
    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=False)
    vocabulary["ab"] = vocabulary.pop("\u0143")
    backend.model = models.BPE(vocab=vocabulary, merges=[("a", "b")])
    return tokenizer


class Folders:
    """Models in folders, each with a tokenizer of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def engine(self, base: Any, tuned: Any, untuned: Any, **of_guide: Any) -> Engine:
        """With these tokenizers; None: the folder has none."""
        given = {"base": base, "tuned": tuned, "untuned": untuned}
        for seed, (name, tokenizer) in enumerate(given.items()):
            vocabulary = BYTE_VOCABULARY + (name == "tuned") * 2
            folder = save_tiny(
                self.root / name, "gpt2", seed=seed, layers=1, vocab_size=vocabulary,
                tokenizer=tokenizer,
            )  # fmt: skip
            if tokenizer is None:
                for file in folder.glob("tokenizer*"):
                    file.unlink()
        paths = {name: str(self.root / name) for name in given}
        guide = Guide(paths["tuned"], paths["untuned"], **of_guide)
        return Engine(base=paths["base"], guides=guide, device="cpu", kv_cache_tokens=512)


@pytest.fixture
def folders_of(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def reference(e: Engine) -> Reference:
    for model in models_of(e):
        model.model.set_attn_implementation("eager")
    guide = ReferenceGuide(*(model.model for model in e.guides[0].models))
    return Reference(e.base.model, [guide], vocab_size=BYTE_VOCABULARY, eos_token_ids=[EOS])


def prompts_of(e: Engine, prompt: Any) -> list[list[int]]:
    """Of base, tuned and untuned."""
    request = e.make_request(prompt, SHORT)
    return request.prompts


def test_a_guide_has_one_template_for_both_models_or_one_for_each(folders: dict[str, Path]) -> None:
    paths = (str(folders["tuned"]), str(folders["untuned"]))

    def prompts(template: Any) -> list[list[int]]:
        guide = Guide(*paths, prompt_template=template)
        e = Engine(base=str(folders["base"]), guides=guide, device="cpu", kv_cache_tokens=512)
        return prompts_of(e, "Hi<eos>")

    spelled = byte_tokenizer()("<eos>", add_special_tokens=False, split_special_tokens=True)
    typed = [*ids("Hi"), *spelled["input_ids"]]
    plain = [BOS, *typed]
    both, one = [*ids("Q "), *typed, EOS], [*ids("Say: "), *typed]
    assert prompts("Q {prompt}<eos>") == [plain, both, both]
    assert prompts(("Q {prompt}<eos>", "Say: {prompt}")) == [plain, both, one]
    assert prompts(["Q {prompt}<eos>", None]) == [plain, both, plain]
    assert prompts((None, "Say: {prompt}")) == [plain, plain, one]


def test_a_search_behind_two_templates_finds_what_the_reference_finds(folders_of: Folders) -> None:
    tokenizer = byte_tokenizer()
    e = folders_of.engine(
        tokenizer, tokenizer, tokenizer, prompt_template=("Well: {prompt}", "<eos>{prompt}")
    )
    tuned, untuned = [*ids("Well: Hi")], [EOS, *ids("Hi")]
    wanted = reference(e).search([BOS, *ids("Hi")], SHORT, [(tuned, untuned)])
    (result,) = e.generate(["Hi"], SHORT)
    assert result.token_ids == wanted.hypotheses[0].token_ids
    assert result.score == pytest.approx(wanted.hypotheses[0].score, abs=1e-3)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (("a{prompt}", "b{prompt}", "c{prompt}"), r"guide 1 is \('a.*pair"),
        ((), "guide 1 is"),
        (5, "guide 1 is 5"),
        ({"tuned": "{prompt}"}, "guide 1 is"),
        ((None, 5), "untuned 1 is 5"),
        ((b"{prompt}", None), "tuned 1 is b'"),
        (("no place", None), " tuned 1 is 'no place'.* {prompt} exactly once"),
        ((None, "{prompt}{prompt}"), "untuned 1 is '{prompt}{prompt}'"),
    ],
)
def test_templates_of_another_shape_are_refused_by_name(template: Any, says: str) -> None:
    base, tuned, untuned = tiny_triple()
    guides = [Guide(tuned, untuned), Guide(tuned, untuned, prompt_template=template)]
    with pytest.raises(InvalidRequest, match=says):
        Engine(base=base, guides=guides, device="cpu", kv_cache_tokens=512)
    if not isinstance(template, (tuple, list, dict)):
        with pytest.raises(InvalidRequest, match="base is 5"):
            Engine(base=base, device="cpu", kv_cache_tokens=512, prompt_template=template)


def chatty(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


ROLES = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
ENDS = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("untuned", ["without a template", "without a tokenizer"])
def test_messages_go_through_each_models_own_chat_template(
    untuned: str, folders_of: Folders
) -> None:
    e = folders_of.engine(
        chatty(ROLES), chatty(ENDS), chatty(None) if untuned == "without a template" else None
    )
    messages = [{"role": "user", "content": "Hi"}]
    own, other = ids("[user]Hi"), [BOS, *ids("Hi"), EOS]
    assert prompts_of(e, messages) == [own, other, own]
    (score,) = e.score([messages], [" you"])
    expected = sum(reference(e).token_scores([(other, own)], ids(" you")))
    assert score == pytest.approx(expected, abs=1e-3)


def test_a_loaded_model_brings_the_tokenizer_that_lies_with_it(folders_of: Folders) -> None:
    folders_of.engine(chatty(ROLES), chatty(ENDS), None)
    tuned, untuned = (
        AutoModelForCausalLM.from_pretrained(folders_of.root / name)
        for name in ("tuned", "untuned")
    )
    base = str(folders_of.root / "base")
    e = Engine(base=base, guides=Guide(tuned, untuned), device="cpu", kv_cache_tokens=512)
    own = ids("[user]Hi")
    assert prompts_of(e, [{"role": "user", "content": "Hi"}]) == [own, [BOS, *ids("Hi"), EOS], own]


def test_each_models_tokenizer_says_what_a_plain_and_an_empty_prompt_begin_with(
    folders_of: Folders,
) -> None:
    other = adding_no_bos(byte_tokenizer())
    other.bos_token = "<eos>"  # as GPT-2 has it
    e = folders_of.engine(byte_tokenizer(), None, other)
    assert prompts_of(e, "Hi") == [[BOS, *ids("Hi")], [BOS, *ids("Hi")], ids("Hi")]
    assert prompts_of(e, "") == [[BOS], [BOS], [EOS]]
    wanted = reference(e).search([BOS], SHORT, [([BOS], [EOS])])
    (result,) = e.generate([""], SHORT)
    assert result.token_ids == wanted.hypotheses[0].token_ids
    assert result.score == pytest.approx(wanted.hypotheses[0].score, abs=1e-3)


@pytest.mark.parametrize(
    "template",
    [
        *(None, (None, "Q{prompt}"), ("Q{prompt}", None), "Q{prompt}"),
        *((None, "Q{prompt}:"), ("Q{prompt}:", None), ("Q{prompt}:", "Q{prompt}")),
    ],
    ids=str,
)
def test_a_given_text_has_the_same_tokens_for_both_models(
    template: Any, folders_of: Folders
) -> None:
    """Behind the same end of a prompt a token may begin in it; else the text stands by itself."""
    base, tuned, untuned = (merging(byte_tokenizer()) for _ in range(3))
    e = folders_of.engine(base, tuned, adding_no_bos(untuned), prompt_template=template)
    (ab,) = base("ab", add_special_tokens=False)["input_ids"]
    given = template if isinstance(template, tuple) else (template, template)
    # A token of prompt and response together, unless something stands between them for a model.
    joined = not any(own is not None and own.endswith(":") for own in given)
    prompt, response = ("x", [ab, *ids("c")]) if joined else ("xa", ids("bc"))
    behind_bos = ([BOS, *ids(prompt)], ids(prompt))
    prompts = tuple(
        plain if own is None else ids(own.format(prompt=prompt))
        for own, plain in zip(given, behind_bos)
    )
    (score,) = e.score(["xa"], ["bc"])
    expected = sum(reference(e).token_scores([prompts], response))
    assert score == pytest.approx(expected, abs=1e-3)


def test_a_guides_tokenizer_may_have_special_tokens_more(folders_of: Folders) -> None:
    tuned, untuned = byte_tokenizer(), byte_tokenizer()
    for tokenizer in (tuned, untuned):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    e = folders_of.engine(
        byte_tokenizer(), tuned, untuned, prompt_template=("[PAD]{prompt}", "{prompt}")
    )
    padding = BYTE_VOCABULARY
    assert e.guides[0].vocab_size == padding
    assert prompts_of(e, "Hi")[1:] == [[padding, *ids("Hi")], ids("Hi")]
    # What a user writes is none, and nobody may ask for it.
    (score,) = e.score(["Hi"], ["[PAD]"])
    spelled = [t for c in "[PAD]" for t in ids(c)]
    prompts = ([padding, *ids("Hi")], ids("Hi"))
    assert score == pytest.approx(sum(reference(e).token_scores([prompts], spelled)), abs=1e-3)
    with pytest.raises(InvalidRequest, match=str(padding)):
        e.score(["Hi"], [[padding]])


def test_a_token_that_a_model_has_no_place_for_is_refused_by_name(folders_of: Folders) -> None:
    untuned = byte_tokenizer()
    untuned.add_special_tokens({"pad_token": "[PAD]"})
    e = folders_of.engine(
        byte_tokenizer(), None, untuned, prompt_template=("{prompt}", "[PAD]{prompt}")
    )
    for ask in (lambda: e.generate(["Hi"], SHORT), lambda: e.score(["Hi"], ["a"])):
        with pytest.raises(
            InvalidRequest, match=r"untuned .* holds token .*, whose id 258 .* to 257$"
        ):
            ask()


def test_a_token_that_the_base_has_no_place_for_is_never_scored(tmp_path: Path) -> None:
    sizes = {"base": 250, "tuned": BYTE_VOCABULARY, "untuned": BYTE_VOCABULARY}
    base, *guide = (
        str(save_tiny(tmp_path / name, "gpt2", layers=1, vocab_size=size, eos=(0,), bos=1))
        for name, size in sizes.items()
    )
    e = Engine(base=base, guides=Guide(*guide), device="cpu", kv_cache_tokens=512)
    rare = "\u00ad"  # its second byte is one of the last in the vocabulary
    refused, well = e.generate(["Hi", ids("Hi")], SHORT, on_error="return")
    assert isinstance(refused.error, InvalidRequest)
    assert "a text for base" in str(refused.error) and f"id {BOS}" in str(refused.error)
    assert well.error is None
    with pytest.raises(InvalidRequest, match=rf"token {ids(rare)[1]}; allowed: below 250"):
        e.score(["Hi"], [rare])


def test_other_tokens_more_are_another_vocabulary(folders_of: Folders) -> None:
    more = byte_tokenizer()
    more.add_tokens(["more"])  # text may hold it, so the guide would read another text
    with pytest.raises(MismatchedVocabulary, match=r"^tuned .*more"):
        folders_of.engine(byte_tokenizer(), more, None)


def test_a_special_token_more_in_a_gap_of_the_base_is_another_vocabulary() -> None:
    base, guide = byte_tokenizer(), byte_tokenizer()
    for tokenizer in (base, guide):
        vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        tokenizer.backend_tokenizer.model = models.BPE(vocab={**vocabulary, "~~": 300}, merges=[])
    check_same_vocabulary(base, guide, "tuned")
    guide.add_special_tokens({"pad_token": "[PAD]"})
    assert guide.pad_token_id < 300
    with pytest.raises(MismatchedVocabulary, match=r"^tuned .*\[PAD\]"):
        check_same_vocabulary(base, guide, "tuned")
