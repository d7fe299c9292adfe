"""Gold rewards by classifiers, against transformers' own call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from tests.support.tiny_models import save_tiny
from w2s_fast.demo import gold_reward
from w2s_fast.errors import InvalidRequest, UnsupportedModel
from w2s_fast.evaluate import ClassifierReward, vader_reward

TEXTS = ["a fine film", "b", "a film of which much could be said, and more " * 10]


def save_classifier(folder: Path, labels: int) -> Path:
    """A tiny one, with the byte-level tokenizer of the tiny models."""
    save_tiny(folder)
    config = LlamaConfig.from_pretrained(folder, num_labels=labels)
    torch.manual_seed(labels)
    model = AutoModelForSequenceClassification.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifiers_reward_is_its_output_or_the_log_odds_of_a_label(
    tmp_path: Path, labels: int
) -> None:
    folder = save_classifier(tmp_path / "gold", labels)
    reward = ClassifierReward(str(folder))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = model.config.max_position_embeddings
    for text, value in zip(TEXTS, reward(TEXTS), strict=True):
        ids = tokenizer(text).input_ids
        if len(ids) > longest:  # BOS, and the end of the text
            ids = [*ids[:1], *ids[1 - longest :]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        expected = logits[0]
        if labels > 1:
            p = logits.softmax(0)[-1]
            expected = torch.log(p / (1 - p))
        assert value == pytest.approx(expected.item(), abs=1e-4)


def test_a_label_is_named_or_numbered(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "gold", 2)
    first, second = (ClassifierReward(str(folder), label)(["x"])[0] for label in ("0", "LABEL_1"))
    assert first == pytest.approx(-second, abs=1e-5)
    with pytest.raises(InvalidRequest, match="LABEL_0, LABEL_1"):
        ClassifierReward(str(folder), "good")


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"lacks score\.weight"):
        ClassifierReward(str(save_tiny(tmp_path / "causal")))
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        ClassifierReward(str(tmp_path / "nowhere"))


def test_vader_is_the_demos_reward() -> None:
    assert vader_reward(TEXTS) == [gold_reward(text) for text in TEXTS]
