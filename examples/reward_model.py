"""A Hugging Face sequence classifier as reward model, beside the guides."""

import sys
from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from w2s_fast import Engine, Guide, ScoredCandidate, SearchParams
from w2s_fast.demo import demo_model_paths


class Reward:
    def __init__(self, path: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForSequenceClassification.from_pretrained(path).eval()

    @torch.inference_mode()
    def __call__(self, candidates: Sequence[ScoredCandidate]) -> list[float]:
        texts = [c.prompt + c.text for c in candidates]
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        return self.model(**batch).logits[:, -1].tolist()  # of the last class


if __name__ == "__main__":
    models = demo_model_paths()  # or any Hugging Face paths or ids
    guide = Guide(tuned=models.tuned, untuned=models.untuned)
    engine = Engine(base=models.base, guides=guide, scorers=[(Reward(sys.argv[1]), 0.5)])
    print(engine.generate("The film", SearchParams(beam_width=2, max_new_tokens=20))[0].text)
