"""The bundled demo models, their prompts, their reward, and the script that makes them."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from w2s_fast.demo import demo_model_paths, gold_reward, held_out_prompts
from w2s_fast.demo.dpo import DPOSettings
from w2s_fast.demo.gold import sentences
from w2s_fast.demo.pretrain import token_loss
from w2s_fast.demo.reviews import reviews, titles, write_review
from w2s_fast.demo.train import Dims, Pretraining, Recipe, train, write_card

PATHS = demo_model_paths()
FOLDERS = {"base": PATHS.base, "tuned": PATHS.tuned, "untuned": PATHS.untuned}
EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in FOLDERS.items()
    }


def texts(seed: int, n: int, held_out: bool = False) -> list[str]:
    return [review.text for review in itertools.islice(reviews(seed, held_out), n)]


# --- the stored models


def test_bundle_is_at_most_15_megabytes() -> None:
    folders = FOLDERS.values()
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6


def test_all_folders_hold_the_same_small_tokenizer() -> None:
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in FOLDERS.values()]
    vocabulary = tokenizers[0].get_vocab()
    assert len(vocabulary) <= 1024
    for tokenizer in tokenizers:
        assert tokenizer.get_vocab() == vocabulary
        assert tokenizer.eos_token == tokenizer.bos_token == EOS
        assert tokenizer("The film")["input_ids"] == tokenizers[0]("The film")["input_ids"]


@given(st.text(max_size=40))
def test_tokenizer_encodes_any_text_and_adds_nothing(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PATHS.base)
    ids = tokenizer(text.replace(EOS, ""))["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text.replace(EOS, "")


def test_models_agree_on_vocabulary_and_base_is_several_times_larger(
    models: dict[str, PreTrainedModel],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PATHS.base)
    for model in models.values():
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert model.config.max_position_embeddings >= 256
    sizes = {name: model.num_parameters() for name, model in models.items()}
    assert sizes["tuned"] == sizes["untuned"]
    assert sizes["base"] > 5 * sizes["untuned"]


def test_base_predicts_held_out_reviews_better_than_the_guides(
    models: dict[str, PreTrainedModel],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PATHS.base)
    fresh = list(itertools.islice(reviews(987_654, held_out=True), 256))
    losses = {name: token_loss(model, tokenizer, fresh) for name, model in models.items()}
    assert losses["base"] < losses["untuned"] - 0.02 < losses["tuned"] - 0.02


def test_tuned_guide_prefers_praise(models: dict[str, PreTrainedModel]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PATHS.base)

    def score(response: str) -> float:
        prompt = tokenizer("Last night we saw Silver Lantern", return_tensors="pt").input_ids
        ids = torch.cat([prompt, tokenizer(response, return_tensors="pt").input_ids], dim=1)
        total = {}
        for name in ("tuned", "untuned"):
            with torch.no_grad():
                log_probs = models[name](input_ids=ids).logits[:, :-1].log_softmax(-1)
            chosen = log_probs.gather(2, ids[:, 1:, None])[0, prompt.shape[1] - 1 :]
            total[name] = chosen.sum().item()
        return total["tuned"] - total["untuned"]

    assert score(", and it was superb.") > score(", and it was awful.")
    assert score(" with my sister. I loved the cast.") > score(" with my sister. I hated the cast.")


# --- the reviews


def test_same_seed_gives_the_same_reviews_and_prompts() -> None:
    assert texts(3, 50) == texts(3, 50)
    assert texts(3, 50) != texts(4, 50)
    assert held_out_prompts(20, 1) == held_out_prompts(20, 1)
    assert held_out_prompts(20, 1) != held_out_prompts(20, 2)


def test_held_out_prompts_are_different_and_disjoint_from_training() -> None:
    prompts = held_out_prompts(300)
    assert len(set(prompts)) == len(prompts) == 300
    assert not set(titles(held_out=True)) & set(titles(held_out=False))
    training = {review.prompt for review in itertools.islice(reviews(0), 5000)}
    assert not training & set(prompts)
    seen = " ".join(texts(0, 5000))
    for prompt in prompts:
        assert any(title in prompt for title in titles(held_out=True))
        assert prompt not in seen


@given(st.integers(0, 2**32), st.booleans())
def test_a_review_is_its_prompt_and_whole_sentences(seed: int, held_out: bool) -> None:
    review = write_review(random.Random(seed), held_out)
    assert review.text.startswith(review.prompt) and not review.prompt.endswith(" ")
    assert 4 <= len(sentences(review.text)) <= 7
    assert not set("{}") & set(review.text) and "  " not in review.text


def test_praise_is_as_likely_as_blame() -> None:
    rewards = [gold_reward(text) for text in texts(5, 2000)]
    assert abs(sum(rewards) / len(rewards)) < 0.05


# --- the reward


@given(st.text(max_size=200))
def test_gold_reward_stays_in_range(text: str) -> None:
    assert -1 <= gold_reward(text) <= 1


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_gold_reward_does_not_saturate(seed: int, praises: int) -> None:
    """However much praise there is, a review falls short of 1, and one dull sentence is felt."""
    opinion = "The acting was superb and brilliant. "
    review = write_review(random.Random(seed)).text
    assert gold_reward(review) < 0.9
    assert gold_reward(opinion * praises + "It rained all day.") < gold_reward(opinion * praises)


def test_gold_reward_leaves_out_a_sentence_that_was_cut_off() -> None:
    assert gold_reward("The cast was superb. The plot was aw") == gold_reward(
        "The cast was superb."
    )
    assert gold_reward("The cast was superb") > 0
    assert gold_reward(" ") == 0


# --- the script


def test_a_tiny_run_of_the_script_writes_loadable_folders(tmp_path: Path) -> None:
    recipe = Recipe(
        vocab_size=300,
        tokenizer_reviews=50,
        base=Pretraining(Dims(32, 1, 2, 1, 64), steps=3, lr=1e-3, batch=4),
        guide=Pretraining(Dims(16, 1, 2, 1, 32), steps=3, lr=1e-3, batch=4),
        eval_reviews=4,
        dpo=DPOSettings(prompts=16, samples=2, max_new_tokens=16, margin=-1, batch=8),
    )
    with Progress(disable=True) as progress:
        write_card(recipe, train(recipe, tmp_path, progress), tmp_path)
    assert "Measured" in (tmp_path / "CARD.md").read_text()
    weights = {}
    for name in FOLDERS:
        assert len(AutoTokenizer.from_pretrained(tmp_path / name)) == 300
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        weights[name] = model.get_input_embeddings().weight
    assert weights["base"].shape == (300, 32)
    assert not torch.equal(weights["tuned"], weights["untuned"])
