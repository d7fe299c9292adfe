"""Within a chunk nothing waits for the device, and what a captured graph would read stays in place.

Seen on the CPU: every operator of a decoding step passes a dispatch mode that knows which ones read
a tensor's values on the host, or have a shape that depends on them. An operator of this package is
one such operator: what its CUDA implementation launches is fixed by shapes alone, see
tests/interpret/test_no_host.py.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.engines import MIXED, PROMPTS, SEARCH, found, make_engine
from tests.support.no_host import SEEN, NoHost
from tests.support.tiny_models import FAMILIES, tiny_model, tiny_triple
from w2s_fast import SearchParams
from w2s_fast.decoding import Decoding
from w2s_fast.decoding.decoder import Decoder
from w2s_fast.models.model import PagedModel


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.where(x > 0),
    ],
)
def test_the_mode_knows_what_waits(waits: Any) -> None:
    with NoHost(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.ones(3))


# The same with models that draw together.
TOGETHER = [
    replace(
        params,
        method="fusion" if params.method == "sample" else params.method,
        proposal="base" if params.method == "sample" else ("fusion", "dynamic_fusion")[i % 2],
        plausibility=0.1 * (i % 3),
        n=1,
    )
    for i, params in enumerate(MIXED)
]


# Mixtral's own code asks on the host which experts were chosen.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
@pytest.mark.parametrize(
    "asked", [pytest.param(MIXED, marks=pytest.mark.thorough), TOGETHER], ids=["alone", "together"]
)
def test_decoding_never_waits_for_the_device(family: str, asked: list[SearchParams]) -> None:
    """A chunk from its plan to its draws, as a search asks for it; rows with a tree and without."""
    engine = make_engine(*tiny_triple((family, "llama", "gpt2"), layers=2, eos=(0, 6, 13)))
    expected = found(engine.generate(PROMPTS, asked))
    run, steps = Decoder.run, 0

    def quiet(self: Decoder, *args: Any) -> Any:
        nonlocal steps
        with NoHost():
            drawn = run(self, *args)
        steps += len(drawn)
        return drawn

    with mock.patch.object(Decoder, "run", quiet):
        long = [p % 18 + 1 for p in range(30)]
        engine.generate([long], replace(SEARCH, max_new_tokens=30))
        assert found(engine.generate(PROMPTS, asked)) == expected
    assert steps > 5
    wanted = ["sample_tokens", *(["fuse_logits", "choose_beta"] if asked is TOGETHER else [])]
    assert all(f"w2s_fast.{name}" in SEEN for name in wanted)


def test_a_padding_token_is_not_looked_for() -> None:
    """GPT-2's own code would look for it in every pass that is not recorded."""
    theirs = copy.deepcopy(tiny_model("gpt2", dtype=torch.float32))
    theirs.config.pad_token_id = 5
    model = PagedModel(theirs, kv_cache_tokens=64, page_size=4)
    slots = model.pool.allocate(1)
    with NoHost():
        model.forward(slots, torch.tensor([5, 1, 5]), [3])
    assert theirs.config.pad_token_id == 5
    assert model.view.config.pad_token_id is None


def test_what_a_step_reads_stays_where_it_is() -> None:
    """Positions and places to write change in value and not in address, step after step."""
    engine = make_engine(*tiny_triple(eos=()))
    model = engine.base
    slots = model.pool.allocate(4)
    model.forward(slots, torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]), [3, 1, 2, 2])
    decoding = Decoding(model, slots, 5)
    plan: Any = decoding.plan

    def tensors() -> dict[str, int]:
        return {n: v.data_ptr() for n, v in vars(plan).items() if isinstance(v, torch.Tensor)}

    decoding.step(torch.tensor([1, 2, 3, 4]))
    before, positions = tensors(), plan.positions.clone()
    assert {"positions", "write"} <= before.keys()
    for _ in range(4):
        decoding.step(torch.tensor([1, 2, 3, 4]))
        positions += 1
        assert torch.equal(plan.positions, positions)
        assert tensors() == before
