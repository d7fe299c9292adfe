"""Tokens drawn from fused logits: the engine finds what the naive reference finds."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.search.test_reference import EOS_SETS, prompts
from tests.support.drawn import drawn
from tests.support.engines import found
from tests.support.recorded import record_missed, replays
from tests.support.recorder import Recording, set_up_as_on_cuda
from tests.support.reference import Reference, ReferenceGuide
from tests.support.results import assert_all_found, assert_same, decided
from tests.support.tiny_models import FAMILIES, VOCABULARY, tiny_model
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.errors import InvalidRequest

# Of each guide its tuned and its untuned model, and its weight.
Settings = tuple[tuple[str, str | None, float], ...]
PAIR: Settings = (("tuned", "untuned", 1.0),)
GUIDES: tuple[Settings, ...] = (
    PAIR,
    (("tuned", "untuned", 0.5), ("other", "untuned", -1.5)),
    (("tuned", None, 1.0),),
    (("base", "untuned", 0.7),),
    (("tuned", "base", 1.3), ("other", None, 0.4)),
    (("base", None, 0.6),),
)


def models(family: str, eos: tuple[int, ...], dtype: torch.dtype) -> dict[str | None, Any]:
    return {
        "base": tiny_model(family, eos=eos, dtype=dtype),
        "tuned": tiny_model("llama", seed=10, layers=1, dtype=dtype),
        "untuned": tiny_model("gpt2", seed=20, layers=1, dtype=dtype),
        "other": tiny_model("mistral", seed=11, layers=1, dtype=dtype),
        None: None,
    }


@functools.cache
def engine_and_reference(
    family: str,
    eos: tuple[int, ...] = (),
    guides: Settings = PAIR,
    page_size: int = 16,
    kv_cache_tokens: int = 4096,
    dtype: torch.dtype = torch.float64,
) -> tuple[Engine, Reference]:
    of = models(family, eos, dtype)
    engine = Engine(
        base=of["base"],
        guides=[Guide(of[tuned], of[untuned], weight) for tuned, untuned, weight in guides],
        device="cpu",
        page_size=page_size,
        kv_cache_tokens=kv_cache_tokens,
    )
    reference = Reference(
        of["base"],
        [ReferenceGuide(of[tuned], of[untuned], weight) for tuned, untuned, weight in guides],
        vocab_size=VOCABULARY,
        eos_token_ids=eos,
    )
    return engine, reference


@st.composite
def fused_params(draw: st.DrawFn, dynamic: bool = True) -> SearchParams:
    method = draw(st.sampled_from(["fusion", "dynamic_fusion", "cbs", "bon", "sample"]))
    kinds = ["fusion", "dynamic_fusion"]
    if not dynamic:
        method, kinds = method.replace("dynamic_", ""), ["fusion"]
    width, successors = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    limit = {"cbs": width, "bon": successors}.get(method, 3)
    ranked = method in ("cbs", "bon")
    falling = method == "cbs" and draw(st.booleans())
    return SearchParams(
        method=method,  # type: ignore[arg-type]
        proposal=draw(st.sampled_from([*kinds, "base"])) if ranked else "base",
        beta=draw(st.sampled_from([None, 1.0, 0.3, -0.5, 0])),
        plausibility=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        beam_width=(3, width, 1) if falling else width,
        successors=successors,
        selection=draw(st.sampled_from(["top", "top", "resample"])) if ranked else "top",
        tau=2.0,
        chunk_length=draw(st.sampled_from([2, 1, 3, 5, None])),
        max_new_tokens=draw(st.sampled_from([10, 7, 3, 1])),
        temperature=draw(st.sampled_from([0.7, 1.0, 0.3, 0.0])),
        top_k=draw(st.sampled_from([0, 50, 3])),
        top_p=draw(st.sampled_from([1.0, 0.9])),
        seed=draw(st.integers(0, 2**64 - 1)),
        stop_token_ids=draw(st.sampled_from([(), (2,)])),
        ignore_eos=draw(st.sampled_from([False, False, True])),
        n=1 if falling else draw(st.integers(1, limit)),
        trace=True,
        finished=draw(st.sampled_from(["hold", "replicate"])),
        dedup=draw(st.booleans()) if ranked else False,
        score=draw(st.sampled_from(["sum", "mean"])),
    )


@drawn(60)
@given(
    family=st.sampled_from(FAMILIES),
    eos=st.sampled_from(EOS_SETS),
    guides=st.sampled_from(GUIDES),
    page_size=st.sampled_from([1, 3, 16]),
    data=st.data(),
)
def test_any_fusion_finds_what_the_reference_finds(
    family: str, eos: tuple[int, ...], guides: Settings, page_size: int, data: st.DataObject
) -> None:
    engine, reference = engine_and_reference(family, eos, guides, page_size)
    dynamic = all(untuned is not None for _, untuned, _ in guides)
    requests = data.draw(
        st.lists(st.tuples(prompts, fused_params(dynamic)), min_size=1, max_size=3)
    )
    assert_all_found(engine, reference, requests)
    assert all(pool.used_pages == 0 for pool in engine.stats().pools.values())


@drawn(15)
@given(
    eos=st.sampled_from(EOS_SETS[2:]),
    params=fused_params(),
    seeds=st.lists(st.integers(0, 99), min_size=2, max_size=4),
)
def test_any_fusion_in_too_few_pages_finds_the_same(
    eos: tuple[int, ...], params: SearchParams, seeds: list[int]
) -> None:
    # Room for one request of the largest kind, 9 rows of 10 tokens and one page, and little more.
    engine, reference = engine_and_reference("llama", eos, PAIR, 2, 132)
    requests = [SearchParams(**{**vars(params), "seed": seed}) for seed in seeds]
    assert_all_found(engine, reference, [([3, 5, 7, 2], p) for p in requests])


SAMPLED: dict[str, Any] = {"n": 3, "max_new_tokens": 12, "temperature": 1.0, "trace": True}


def same_as_reference(guides: Settings, **params: Any) -> None:
    engine, reference = engine_and_reference("llama", (0,), guides)
    compared = 0
    for seed in range(5):
        wanted = SearchParams(**{**SAMPLED, **params}, seed=seed)
        expected = reference.search([6, 2, 9], wanted)
        if decided(expected):
            assert_same(engine.generate([[6, 2, 9]], wanted)[0], expected)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize(
    ("guides", "params"),
    [
        # Emulated fine-tuning: the guide is a fine-tuned small model and its untuned one.
        pytest.param(PAIR, {"method": "fusion"}, id="EFT"),
        pytest.param(PAIR, {"method": "fusion", "beta": 1.0}, id="proxy-tuning"),
        # DExperts: an expert against an anti-expert.
        pytest.param(
            (("tuned", "other", 2.0),), {"method": "fusion", "temperature": 0.7}, id="DExperts"
        ),
        pytest.param(
            (("base", "untuned", 1.0),),
            {"method": "fusion", "plausibility": 0.1},
            id="contrastive decoding",
        ),
        pytest.param((("tuned", None, 1.0),), {"method": "fusion", "beta": 0.5}, id="GenARM"),
        # Decoding-time realignment: between the untuned base and its tuned version.
        pytest.param(
            (("tuned", "base", 1.0),), {"method": "fusion", "beta": 0.4}, id="realignment"
        ),
        pytest.param(
            PAIR,
            {"method": "dynamic_fusion", "temperature": 0.05},
            id="dynamic logit fusion",
        ),
        pytest.param(PAIR, {"proposal": "fusion", "n": 2}, id="search among fused candidates"),
        pytest.param(
            PAIR, {"method": "bon", "successors": 4, "proposal": "fusion"}, id="best of fused"
        ),
    ],
)
def test_methods_of_the_field_are_settings(guides: Settings, params: dict[str, Any]) -> None:
    same_as_reference(guides, **params)


def tokens(engine: Engine, prompts: list[list[int]], params: SearchParams) -> list[list[int]]:
    results = engine.generate(prompts, params)
    return [hypothesis.token_ids for result in results for hypothesis in result.hypotheses]


PROMPTS = [[1, 2, 3], [4], [9, 9, 2, 7, 1]]


@pytest.mark.parametrize("guides", GUIDES, ids=str)
def test_beta_zero_draws_what_the_base_draws(guides: Settings) -> None:
    engine, _ = engine_and_reference("llama", (0,), guides, dtype=torch.float32)
    for temperature in (0.7, 1.0):
        options: dict[str, Any] = {**SAMPLED, "temperature": temperature}
        plain = engine.generate(PROMPTS, SearchParams(method="sample", **options))
        fused = engine.generate(PROMPTS, SearchParams(method="fusion", beta=0.0, **options))
        for ours, theirs in zip(fused, plain):
            for a, b in zip(ours.hypotheses, theirs.hypotheses, strict=True):
                assert (a.token_ids, a.token_logprobs) == (b.token_ids, b.token_logprobs)
                assert a.score is not None and b.score is None


def test_two_guides_of_half_the_weight_are_one() -> None:
    one, _ = engine_and_reference("llama", (0,), PAIR, dtype=torch.float32)
    half = (("tuned", "untuned", 0.5),) * 2
    two, _ = engine_and_reference("llama", (0,), half, dtype=torch.float32)
    params = SearchParams(method="fusion", **SAMPLED)
    assert tokens(two, PROMPTS, params) == tokens(one, PROMPTS, params)


def test_a_model_with_two_roles_has_pages_once() -> None:
    def names(guides: Settings) -> int:
        return len(engine_and_reference("llama", (0,), guides)[0].stats().pools)

    assert [names(guides) for guides in GUIDES] == [3, 4, 2, 2, 3, 1]


def test_one_beta_for_each_guide() -> None:
    engine, reference = engine_and_reference("llama", (0,), GUIDES[1])
    params = SearchParams(method="fusion", beta=[0.25, 0.75], **SAMPLED)
    expected = reference.search([5, 1], params)
    assert decided(expected)
    assert_same(engine.generate([[5, 1]], params)[0], expected)


def test_the_score_is_the_guides_log_ratio() -> None:
    engine, _ = engine_and_reference("gpt2", (0,), GUIDES[1])
    for method in ("fusion", "dynamic_fusion"):
        (result,) = engine.generate(
            [[1, 2]],
            SearchParams(method=method, **SAMPLED),  # type: ignore[arg-type]
        )
        for hypothesis in result.hypotheses:
            (score,) = engine.score([[1, 2]], [hypothesis.token_ids])
            assert hypothesis.score == pytest.approx(score, abs=1e-4)


TOGETHER: list[dict[str, Any]] = [
    {"method": "fusion", "n": 3},
    {"method": "fusion", "n": 2, "beta": -0.5, "plausibility": 0.2},
    {"method": "dynamic_fusion", "n": 3},
    {"proposal": "fusion", "chunk_length": 3, "n": 2},
    {"proposal": "dynamic_fusion", "method": "bon", "successors": 3, "plausibility": 0.1},
    {"method": "sample", "n": 2},
    {"chunk_length": 4},
]


def recorded_engine(guides: Settings) -> Engine:
    """An engine on its GPU path, and the same models as engine_and_reference("llama", (0,), ...)
    in float32."""
    of = models("llama", (0,), torch.float32)
    with set_up_as_on_cuda(lambda _: Recording):
        return Engine(
            base=of["base"],
            guides=[Guide(of[tuned], of[untuned], weight) for tuned, untuned, weight in guides],
            device="cpu",
            kv_cache_tokens=4096,
            max_rows=64,
        )


@pytest.mark.parametrize("ahead", [pytest.param(False, marks=pytest.mark.thorough), True])
@pytest.mark.parametrize("guides", GUIDES, ids=str)
def test_fusion_from_recordings_finds_the_same(guides: Settings, ahead: bool) -> None:
    plain, _ = engine_and_reference("llama", (0,), guides, dtype=torch.float32)
    engine = recorded_engine(guides)
    engine._search._ahead = ahead
    graphs = engine._search.fused.expansion.decoder.graphs
    assert graphs is not None
    dynamic = all(untuned is not None for _, untuned, _ in guides)
    asked = [own for own in TOGETHER if dynamic or "dynamic_fusion" not in own.values()]
    requests = [SearchParams(**{"max_new_tokens": 12, **own}, seed=3) for own in asked]
    prompts = [[1 + i, *range(2, 8)] for i in range(len(requests))]
    expected = found(plain.generate(prompts, requests))
    for _ in range(3):
        assert found(engine.generate(prompts, requests)) == expected
        record_missed(engine)
    assert replays(graphs) > 0 and replays(graphs.firsts) > 0
    if ahead:  # by themselves, too: whatever others ask for
        for prompt, own, wanted in zip(prompts, requests, expected):
            assert found(engine.generate([prompt], own)) == [wanted]


def refused(guides: Settings | None, params: SearchParams) -> str:
    if guides is None:
        engine = Engine(tiny_model("llama"), device="cpu", kv_cache_tokens=1024)
    else:
        engine, _ = engine_and_reference("llama", (0,), guides)
    with pytest.raises(InvalidRequest) as error:
        engine.generate([[1]], params)
    return str(error.value)


def test_bad_requests_are_named() -> None:
    assert "'fusion' needs guides" in refused(None, SearchParams(method="fusion"))
    assert "needs guides" in refused(None, SearchParams(method="bon", proposal="fusion"))
    both = refused(GUIDES[2], SearchParams(method="dynamic_fusion"))
    assert "dynamic_fusion compares" in both and "allowed: guides that have both" in both
    many = refused(PAIR, SearchParams(method="fusion", beta=[1.0, 2.0]))
    assert "beta has 2 numbers" in many and "one for each of 1 guides" in many


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("beta", [math.nan, math.inf, "1", b"1", [], [1.0, math.nan], True]),
        ("plausibility", [-0.1, 1.1, math.nan]),
        ("proposal", ["guides", None]),
    ],
)
def test_bad_parameters_are_named(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=f"{field} is .*allowed"):
            SearchParams(**{field: value})


def test_the_example_of_the_page_on_methods_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    (example,) = (block.split("```")[0] for block in page.read_text().split("```python\n")[1:])
    exec(compile(example, str(page), "exec"), {})
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert len(told) == 6 and told["sampling"].startswith("None ")
    assert float(told["EFT"].split()[0]) > 0
