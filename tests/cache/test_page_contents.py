"""The pages hold what a recomputation of each sequence gives, whatever was done to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.contents import assert_recomputed
from tests.support.drawn import drawn
from tests.support.engines import LONG_PROMPTS, MIXED, PROMPTS, make_engine, models_of
from tests.support.tiny_models import tiny_model, tiny_triple
from w2s_fast.decoding import Decoding
from w2s_fast.models.model import PagedModel


def test_what_a_search_leaves_in_the_pages_is_what_a_recomputation_gives() -> None:
    """After forks and prunings, in every model and every row, at every step of a search."""
    compared = {"base": 0, "guides": 0}
    models = tiny_triple(eos=(), dtype=torch.float32)
    engine = make_engine(*models)
    fresh = {
        m.name: PagedModel(m.model, page_size=16, kv_cache_tokens=256) for m in models_of(engine)
    }
    step = engine._search.step

    def checked(requests: Any) -> None:
        step(requests)
        for request in requests:
            for beam in [*request.beams.kept, *request.beams.candidates]:
                for name, text, model, slot in _held(engine, request, beam):
                    assert_recomputed(model, slot, text, fresh[model.name])
                    compared[name] += 1

    with mock.patch.object(engine._search, "step", checked):
        engine.generate([LONG_PROMPTS[0], *PROMPTS[:2], LONG_PROMPTS[1]], MIXED[:4])
    assert all(count > 20 for count in compared.values()), compared


def _held(engine: Any, request: Any, beam: Any) -> Iterator[tuple[str, list[int], Any, int]]:
    """("base" or "guides", text, model, slot) of the sequences that a beam holds."""
    prompts = request.prompts
    for i, (model, slot, prompt) in enumerate(zip(models_of(engine), beam.slots, prompts)):
        # Candidates' new tokens reach the guides at the end of the round.
        tokens = beam.tokens[: len(beam.token_scores)] if i else beam.tokens
        if slot >= 0:
            yield "guides" if i else "base", [*prompt, *tokens][:-1], model, slot


@drawn(25)
@given(data=st.data(), page_size=st.sampled_from([1, 3, 4, 16]))
def test_forks_prunings_and_roll_backs_leave_what_a_recomputation_gives(
    data: st.DataObject, page_size: int
) -> None:
    """Sequences are extended, forked, pruned and cut back in any order, by one pass or by many."""
    tiny = tiny_model("llama", dtype=torch.float32)
    model = PagedModel(tiny, page_size=page_size, kv_cache_tokens=512, max_slots=8)
    other = PagedModel(tiny, page_size=16, kv_cache_tokens=128)
    texts: dict[int, list[int]] = {int(model.pool.allocate(1)[0]): []}
    draw = data.draw
    for _ in range(draw(st.integers(1, 12))):
        slots = draw(st.lists(st.sampled_from(sorted(texts)), min_size=1, unique=True))
        held = [slot for slot in slots if texts[slot]]
        what = draw(st.sampled_from(["append", "append", "decode", "fork", "prune", "roll back"]))
        if what == "append":
            new = [draw(st.lists(st.integers(0, 19), min_size=1, max_size=6)) for _ in slots]
            model.forward(
                slots,
                torch.tensor([token for tokens in new for token in tokens]),
                [len(n) for n in new],
            )
            for slot, tokens in zip(slots, new):
                texts[slot] = texts[slot] + tokens
        elif what == "decode":
            steps = draw(st.integers(1, 5))
            decoding = Decoding(model, slots, steps)
            for _ in range(draw(st.integers(1, steps))):
                tokens = [draw(st.integers(0, 19)) for _ in slots]
                decoding.step(torch.tensor(tokens))
                for slot, token in zip(slots, tokens):
                    texts[slot] = [*texts[slot], token]
            model.pool.trim(slots)
        elif what == "fork" and len(texts) < 8:
            child = int(model.pool.fork(slots[:1], [1])[0])
            texts[child] = texts[slots[0]]
        elif what == "prune" and len(texts) > len(slots):
            model.pool.release(slots)
            for slot in slots:
                del texts[slot]
        elif what == "roll back" and held:
            lengths = [draw(st.integers(0, len(texts[slot]))) for slot in held]
            model.pool.truncate(held, lengths)
            for slot, length in zip(held, lengths):
                texts[slot] = texts[slot][:length]
    model.pool.manager.check()
    for slot, text in texts.items():
        if text:
            assert_recomputed(model, slot, text, other)
