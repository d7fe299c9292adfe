"""The result is a pure function of models, prompt, parameters and seed."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.support.engines import (
    PROMPTS,
    SEARCH,
    engine,
    found,
    make_engine,
)
from tests.support.tiny_models import (
    tiny_model,
    tiny_triple,
)
from w2s_fast import SearchParams


def test_children_of_one_parent_draw_different_noise() -> None:
    base = tiny_model("llama", peak=0.1, eos=())  # equal chunks by chance: 1 in 20^5
    e = make_engine(base, *tiny_triple()[1:])
    params = SearchParams(
        beam_width=3, successors=4, chunk_length=5, max_new_tokens=20, temperature=1.0, top_k=0,
        trace=True,
    )  # fmt: skip
    for result in e.generate(PROMPTS, params):
        assert result.trace is not None
        for one in result.trace.rounds:
            chunks = [tuple(c.token_ids[-5:]) for c in one.candidates]
            assert len(set(chunks)) == len(chunks) == 12


def test_a_seed_decides_the_tokens_and_another_seed_gives_others() -> None:
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    params = [replace(SEARCH, seed=s) for s in seeds]
    prompt = PROMPTS[2]
    first = engine().generate([prompt] * 5, params)
    again = make_engine(*tiny_triple(eos=(0, 6, 13))).generate([prompt] * 5, params)
    assert found(first) == found(again)
    candidates = [
        tuple(tuple(c.token_ids) for c in r.trace.rounds[0].candidates)
        for r in first
        if r.trace is not None
    ]
    assert len(set(candidates)) == 5


def test_no_global_generator_is_read_or_moved() -> None:
    torch.manual_seed(1)
    first = engine().generate(PROMPTS, SEARCH)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = engine().generate(PROMPTS, SEARCH)
    assert found(first) == found(second)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
