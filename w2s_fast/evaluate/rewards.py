"""Gold rewards: VADER, or any sequence classifier. They measure answers; no search sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from w2s_fast.demo import gold_reward
from w2s_fast.errors import InvalidRequest, UnsupportedModel


class Reward(Protocol):
    """Values whole texts, prompts and their answers."""

    def __call__(self, texts: Sequence[str], /) -> list[float]: ...


def vader_reward(texts: Sequence[str]) -> list[float]:
    """VADER's sentiment, averaged over sentences, in [-1, 1]."""
    return [gold_reward(text) for text in texts]


class ClassifierReward:
    """A sequence classifier of transformers.

    With one output, as reward models have it, that is the reward. With several it is the log-odds
    of one label, as the paper takes them from its sentiment classifier.
    """

    def __init__(self, source: str, label: str | None = None, device: str = "cpu") -> None:
        """
        Args:
            source: path or hub id.
            label: its name or number; None: the last one.

        Raises:
            UnsupportedModel: it cannot be read as a sequence classifier.
            InvalidRequest: it has no such label.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            # What is too long loses its beginning: the answer stands at the end.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, truncation_side="left")
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                source, output_loading_info=True
            )
        except Exception as error:  # transformers raises nearly anything for a broken folder
            raise UnsupportedModel(
                f"{source!r} cannot be loaded as a sequence classifier: {error}"
            ) from error
        model, found = loaded
        if found["missing_keys"]:  # transformers would draw its head at random
            names = ", ".join(sorted(found["missing_keys"])[:3])
            raise UnsupportedModel(f"{source!r} is no sequence classifier: it lacks {names}")
        self._model: Any = model.eval().to(device)
        self._label = _label_number(model.config, label)
        longest = getattr(model.config, "max_position_embeddings", None) or 1 << 20
        self._longest = min(longest, self._tokenizer.model_max_length)

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """One text at a time: its reward depends on no other's length."""
        import torch

        values: list[float] = []
        with torch.inference_mode():
            for text in texts:
                encoded = self._tokenizer(
                    text, truncation=True, max_length=self._longest, return_tensors="pt"
                )
                (logits,) = self._model(**encoded.to(self._model.device)).logits.float()
                if len(logits) > 1:
                    others = torch.ones_like(logits, dtype=torch.bool)
                    others[self._label] = False
                    values.append(float(logits[self._label] - logits[others].logsumexp(0)))
                else:
                    values.append(float(logits[0]))
        return values


def _label_number(config: Any, label: str | None) -> int:
    names = {int(number): str(name) for number, name in config.id2label.items()}
    if label is None:
        return max(names)
    for number, name in names.items():
        if label in (name, str(number)):
            return number
    raise InvalidRequest(f"no label {label!r}; allowed: {', '.join(names.values())}, or a number")
