"""Every model family through the attention kernels equals its own eager forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.interpret.rule import DEVICE
from tests.support.tiny_models import FAMILIES, VOCABULARY, tiny_model
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.models.model import PagedModel

LENGTHS = (19, 7, 33)  # on and off the borders of pages of 16


def model_on_device(family: str) -> Any:
    """A GPU's kernels have no float64."""
    if DEVICE == "cpu":
        return tiny_model(family, layers=1)
    return copy.deepcopy(tiny_model(family, layers=1, dtype=torch.float32)).to(DEVICE)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_append_and_decode_equal_the_eager_forward(family: str) -> None:
    model = model_on_device(family)
    paged = PagedModel(model, kv_cache_tokens=256)
    texts = [torch.randint(VOCABULARY, (length,)).to(DEVICE) for length in LENGTHS]
    slots = paged.pool.allocate(len(texts))
    done = [0] * len(texts)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for new in ([12, 1, 16], [1, 1, 1], [6, 5, 16]):
        tokens = torch.cat([t[d : d + n] for t, d, n in zip(texts, done, new)])
        logits = paged.logits(paged.forward(slots, tokens, new))
        for own, part in zip(found, logits.split(new)):
            own.append(part)
        done = [d + n for d, n in zip(done, new)]
    assert tuple(done) == LENGTHS
    for text, own in zip(texts, found):
        expected = model(input_ids=text[None], use_cache=False).logits[0]
        torch.testing.assert_close(torch.cat(own), expected, atol=1e-4, rtol=1e-4)


def test_a_fork_writes_nothing_of_its_parents() -> None:
    model = model_on_device("llama")
    paged = PagedModel(model, kv_cache_tokens=512)
    prompt = torch.randint(VOCABULARY, (21,)).to(DEVICE)
    (parent,) = paged.pool.allocate(1)
    paged.forward([parent], prompt, [21])
    children = paged.pool.fork([parent], [2])
    rows = [int(parent), *map(int, children)]
    tails = torch.randint(VOCABULARY, (3, 14)).to(DEVICE)
    logits = paged.logits(paged.forward(rows, tails.flatten(), [14] * 3)).view(3, 14, -1)
    paged.pool.release(children[:1])
    for tail, own in zip(tails, logits):
        expected = model(input_ids=torch.cat([prompt, tail])[None], use_cache=False).logits[0, 21:]
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


def test_it_is_the_kernels_that_run() -> None:
    paged = PagedModel(model_on_device("gpt2"), kv_cache_tokens=64)
    slots = paged.pool.allocate(1)
    paged.pool.reserve(slots, [1])
    assert isinstance(paged.backend.make(paged.pool, slots, [1]), KernelPlan)
