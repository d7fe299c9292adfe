"""Guides on another device than the base find what they find beside it.

The other device exists in name only, and whatever would compute with tensors of both raises there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft.utils import load_peft_weights

from tests.support.adapters import LINEAR, save_adapter
from tests.support.device import DEVICE, Device
from tests.support.engines import (
    LONG_PROMPTS,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    found,
    models_of,
)
from tests.support.foreign_guides import PROMPTS as TEXTS
from tests.support.foreign_guides import SEARCH as READ
from tests.support.foreign_guides import make, pair
from tests.support.probed import probed_once
from tests.support.recorder import Recording, set_up_as_on_cuda
from tests.support.tiny_models import byte_tokenizer, save_tiny, tiny_model
from w2s_fast import Engine, Guide, SearchParams, SearchResult
from w2s_fast.engine import served
from w2s_fast.errors import InvalidRequest
from w2s_fast.models import load_model
from w2s_fast.models.activations import Activations
from w2s_fast.models.memory import kv_tokens_that_fit

HOST = torch.device("cpu")
WAYS = [(HOST, DEVICE), (DEVICE, HOST)]  # of the base, and of guides
IDS = ["guides away", "base away"]

PARAMS = {
    "cbs": SEARCH,
    "mean": replace(SEARCH, score="mean", dedup=True, chunk_length=(1, 4), beam_width=(3, 2)),
    "bon": SearchParams(method="bon", successors=4, max_new_tokens=9, n=3, seed=4, trace=True),
    "sample": SearchParams(method="sample", n=3, max_new_tokens=7, temperature=1.3, trace=True),
    "beam": SearchParams(method="beam", beam_width=3, n=2, max_new_tokens=8),
    "fusion": SearchParams(method="fusion", n=2, max_new_tokens=9, plausibility=0.05, seed=3),
    "min_new_tokens": SearchParams(method="fusion", max_new_tokens=9, min_new_tokens=6),
    "dynamic_fusion": SearchParams(method="dynamic_fusion", n=2, max_new_tokens=9),
    "proposal": replace(SEARCH, proposal="fusion", max_new_tokens=7),
    "resample": replace(SEARCH, selection="resample"),
}


@pytest.fixture
def device() -> Iterator[Device]:
    """Within which a test makes and runs engines."""
    with Device() as device:
        yield device


def tiny(seed: int, family: str = "llama") -> Any:
    """A model of its own for one engine, which may move it."""
    return copy.deepcopy(tiny_model(family, seed=seed, layers=1, eos=(0, 6, 13)))


def guides(*devices: torch.device | None) -> list[Guide]:
    """One on each of these devices; a third one has no untuned model."""
    return [
        Guide(
            tiny(1 + 2 * i, "gpt2"),
            None if i == 2 else tiny(2 + 2 * i, "gpt2"),
            1 - i / 4,
            device=device,
        )
        for i, device in enumerate(devices)
    ]


def engine_of(base: Any, own: Sequence[Guide], device: torch.device, **options: Any) -> Engine:
    options = {"kv_cache_tokens": 4096, "page_size": 4, "device": device, **options}
    with probed_once():
        return Engine(base, own, **options)


def told(results: Sequence[SearchResult]) -> list[Any]:
    """All that results say, but for times."""
    for result in results:
        assert result.error is None, result.error
    return [
        (
            [asdict(hypothesis) for hypothesis in result.hypotheses],
            result.usage,
            result.trace and [asdict(one) for one in result.trace.rounds],
        )
        for result in results
    ]


def run(engine: Engine, params: SearchParams) -> list[Any]:
    results = engine.generate(LONG_PROMPTS[:2] + PROMPTS[:2], params, on_error="return")
    assert_all_pages_free(engine)
    return told(results)


@pytest.fixture(scope="module")
def expected() -> Callable[..., list[Any]]:
    """What searches find where all lies on one device; computed once."""
    engines: dict[int, Engine] = {}
    known: dict[tuple[int, str], list[Any]] = {}

    def of(name: str, count: int) -> list[Any]:
        if count not in engines:
            engines[count] = engine_of(tiny(0), guides(*[None] * count), HOST)
        if (count, name) not in known:
            known[count, name] = run(engines[count], PARAMS[name])
        return known[count, name]

    return of


@contextmanager
def reading() -> Iterator[Device]:
    """A device on which models are read, too: as transformers reads them where there is none, for
    it makes use of devices that the stand-in knows nothing of; and then moved."""
    with Device() as device:

        def load(source: Any, where: torch.device, *args: Any) -> Any:
            with device._away():
                model = load_model(source, HOST, *args)
            return torch.nn.Module.to(model, where)

        def weights(folder: str, device: str) -> dict[str, torch.Tensor]:
            return {name: own.to(device) for name, own in load_peft_weights(folder, "cpu").items()}

        with (
            mock.patch("w2s_fast.engine.served.load_model", load),
            mock.patch("peft.utils.load_peft_weights", weights),
        ):
            yield device


def devices_of(engine: Engine) -> list[torch.device]:
    return [model.device for model in models_of(engine)]


# ---- searches ----


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_every_method_finds_the_same(
    way: tuple[torch.device, torch.device], expected: Callable[..., list[Any]]
) -> None:
    own, there = way
    wanted = {name: expected(name, 1) for name in PARAMS}
    with Device():
        engine = engine_of(tiny(0), guides(there), own)
        assert devices_of(engine) == [own, there, there]
        for name, params in PARAMS.items():
            assert run(engine, params) == wanted[name], name


@pytest.mark.parametrize(
    "where",
    [(None, DEVICE), (DEVICE, None, DEVICE), (DEVICE, HOST)],
    ids=["second", "both sides", "first"],
)
def test_guides_on_different_devices(
    where: Sequence[torch.device | None], expected: Callable[..., list[Any]]
) -> None:
    names = ["cbs", "bon", "fusion", "dynamic_fusion" if len(where) == 2 else "proposal"]
    wanted = [expected(name, len(where)) for name in names]
    with Device():
        engine = engine_of(tiny(0), guides(*where), HOST)
        assert [run(engine, PARAMS[name]) for name in names] == wanted


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_steps_that_are_launched_ahead(
    way: tuple[torch.device, torch.device], expected: Callable[..., list[Any]]
) -> None:
    """As on two CUDA devices; a guide on a CPU reads what was drawn first."""
    own, there = way
    wanted = [expected(name, 1) for name in PARAMS]
    with Device():
        engine = engine_of(tiny(0), guides(there), own)
        assert isinstance(engine._search.ahead, bool) and not engine._search.ahead
        engine._search._ahead = True
        assert [run(engine, params) for params in PARAMS.values()] == wanted


def test_the_base_draws_from_recordings_and_nothing_spans_devices(
    expected: Callable[..., list[Any]],
) -> None:
    wanted = [expected(name, 1) for name in PARAMS]
    with set_up_as_on_cuda(lambda _: Recording):
        engine = engine_of(tiny(0), guides(None), HOST, max_rows=64)
    search = engine._search
    assert search.guides._graphs is not None and search.fused.expansion.decoder.graphs is not None
    with Device() as device:

        def on_one_side(run: Any) -> Any:
            """The base is on the host, so what it records is."""
            return run

        with set_up_as_on_cuda(lambda _: on_one_side):
            engine = engine_of(tiny(0), guides(DEVICE), HOST, max_rows=64)
        search = engine._search
        assert search.guides._graphs is None and search.fused.expansion.decoder.graphs is None
        assert search.base.expansion.decoder.graphs is not None
        assert all(model.replays is not None for model in models_of(engine))
        assert [run(engine, params) for params in PARAMS.values()] == wanted
        assert device.holds(engine.guides[0].models[0].pool.kv)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_scorers(way: tuple[torch.device, torch.device]) -> None:
    def evens(candidates: Sequence[Any]) -> list[float]:
        return [sum(token % 2 == 0 for token in one.token_ids) / 2 for one in candidates]

    own, there = way
    wanted = run(engine_of(tiny(0), guides(None), HOST, scorers=[evens]), SEARCH)
    with Device():
        assert run(engine_of(tiny(0), guides(there), own, scorers=[evens]), SEARCH) == wanted


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_guides_of_other_vocabularies(way: tuple[torch.device, torch.device]) -> None:
    def foreign(*devices: torch.device | None) -> list[Guide]:
        kinds = ["bpe-first", "wordpiece"]
        return [
            replace(
                own, tuned=copy.deepcopy(own.tuned), untuned=copy.deepcopy(own.untuned), device=d
            )
            for own, d in zip((pair(kind) for kind in kinds), devices)
        ]

    def searched(engine: Engine) -> Any:
        found = told(engine.generate(TEXTS, READ, on_error="return"))
        assert_all_pages_free(engine)
        return found, engine.score(TEXTS, ["hello", " film", "\u5929", "y"])

    own, there = way
    wanted = searched(make("bytes-gpt2", foreign(None, None)))
    with Device(), mock.patch("tests.support.foreign_guides.tiny_model", copied(tiny_model)):
        assert searched(make("bytes-gpt2", foreign(there, there), device=own)) == wanted
        # Of both at once all log-probs are read together.
        assert searched(make("bytes-gpt2", foreign(there, own), device=own)) == wanted


def copied(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: copy.deepcopy(make(*args, **options))


# ---- what is asked beside searches ----


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_given_texts(way: tuple[torch.device, torch.device]) -> None:
    def asked(engine: Engine) -> Any:
        prompts, responses = PROMPTS[:3], [[4, 5, 6], [7], [1, 2]]
        return (
            engine.score(prompts, responses),
            engine.token_scores(prompts, responses),
            [engine.token_scores(prompts, responses, model=m) for m in ("base", "untuned 1")],
            engine.log_probs(LONG_PROMPTS[:2], top=3),
        )

    own, there = way
    wanted = asked(engine_of(tiny(0), guides(None, None), HOST))
    with Device():
        assert asked(engine_of(tiny(0), guides(there, None), own)) == wanted


# ---- what is loaded ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base, and a smaller model; in float32."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    return [
        save_tiny(root / name, seed=seed, layers=layers, tokenizer=tokenizer)
        for name, seed, layers in (("base", 0, 2), ("small", 1, 1))
    ]


CONTRASTIVE = [
    SearchParams(method="fusion", n=2, max_new_tokens=9, plausibility=0.1),
    replace(SEARCH, max_new_tokens=8),
]


def contrasted(engine: Engine) -> list[Any]:
    """But for rounding: what the base says of its own tokens is computed in another way."""
    return [found(engine.generate(["a film", "b"], own)) for own in CONTRASTIVE]


def test_a_base_that_is_named_on_another_device_is_a_model_more(folders: list[Path]) -> None:
    base, small = folders
    engine = engine_of(base, [Guide(base, small)], HOST)
    assert engine.guides[0].models[0] is engine.base
    wanted = contrasted(engine)
    with reading() as device:
        engine = engine_of(base, [Guide(base, small, device=DEVICE)], HOST)
        tuned = engine.guides[0].models[0]
        assert tuned is not engine.base and tuned.model is not engine.base.model
        assert device.holds(tuned.model.get_input_embeddings().weight)
        assert not device.holds(engine.base.model.get_input_embeddings().weight)
        assert contrasted(engine) == wanted
        # The other's own, where both say the same of it.
        both = [Guide(base, small, 0.5), Guide(base, small, 0.5, device=DEVICE)]
        engine = engine_of(base, both, HOST)
        assert engine.guides[0].models[0] is engine.base
        assert len(set(models_of(engine))) == 4
        halves = engine.score(["a"], ["bc"])
        assert halves == pytest.approx(
            engine_of(base, [Guide(base, small)], HOST).score(["a"], ["bc"])
        )


def test_a_device_that_is_the_engines_is_none_more(folders: list[Path]) -> None:
    base, small = folders
    named = [Guide(base, small, device="cpu"), Guide(small, None, device=torch.device("cpu"))]
    engine = engine_of(base, named, HOST)
    assert len(set(models_of(engine))) == 2
    assert engine.guides[0].models[0] is engine.base
    assert engine_of(base, [Guide(small, base, device="auto")], torch.device("cpu", 0)).guides


def test_adapters_are_read_for_each_device(folders: list[Path], tmp_path: Path) -> None:
    base, small = folders
    adapter = save_adapter(
        tiny_model("llama", seed=1, layers=1, vocab_size=258, eos=(257,), bos=256,
                   dtype=torch.float32),
        tmp_path / "adapter",
        target_modules=LINEAR["llama"],
    )  # fmt: skip
    one, two = Guide(adapter, small), Guide(adapter, small, -0.25)
    params = [SEARCH, SearchParams(method="fusion", max_new_tokens=6)]

    def searched(*own: Guide) -> list[Any]:
        engine = engine_of(base, own, HOST)
        return [found(engine.generate(["a film"], each)) for each in params]

    wanted = searched(one, two)
    with reading():
        assert searched(replace(one, device=DEVICE), two) == wanted
        assert searched(replace(one, device=DEVICE), replace(two, device=DEVICE)) == wanted


def test_a_loaded_guide_is_moved(device: Device) -> None:
    tuned, untuned = tiny(1), tiny(2)
    engine_of(tiny(0), [Guide(tuned, untuned, device=DEVICE)], HOST)
    assert device.holds(tuned.lm_head.weight) and device.holds(untuned.lm_head.weight)


def test_weights_that_change_are_followed(device: Device) -> None:
    base, (guide,) = tiny(0), guides(DEVICE)
    engine = engine_of(base, [guide], HOST)
    before = engine.score([[1]], [[2, 3]])
    with torch.no_grad():
        guide.tuned.lm_head.weight.mul_(0.5)  # type: ignore[union-attr]
    assert engine.score([[1]], [[2, 3]]) != before


# ---- what is refused ----


def test_a_loaded_model_is_on_one_device(device: Device) -> None:
    base, small = tiny(0), tiny(1)
    with pytest.raises(InvalidRequest, match="base and tuned are one loaded LlamaForCausalLM"):
        engine_of(base, [Guide(base, small, device=DEVICE)], HOST)
    assert not device.holds(base.lm_head.weight)
    with pytest.raises(InvalidRequest, match="tuned 0 and untuned 1 are one loaded"):
        engine_of(base, [Guide(small, None, device=DEVICE), Guide(tiny(2), small)], HOST)
    assert not device.holds(small.lm_head.weight)


@pytest.mark.parametrize("wrong", ["nowhere", "cuda:99", object()])
def test_devices_that_are_none(wrong: Any, folders: list[Path]) -> None:
    with pytest.raises(InvalidRequest, match="device"):
        engine_of("no such folder", [Guide(folders[1], None, device=wrong)], HOST)


def test_ranks_have_guides_where_they_are() -> None:
    with (
        mock.patch("w2s_fast.engine.engine.device_of_rank", return_value=HOST),
        pytest.raises(InvalidRequest, match="a guide's device with tensor_parallel"),
    ):
        Engine("anything", Guide("a", "b", device="cpu"), tensor_parallel=2)


def test_attention_that_cannot_run_there() -> None:
    """Elsewhere than on a CPU, where there is nothing to choose."""
    cuda = torch.device("cuda", 0)
    assert served.attention_on(HOST, "flash", cuda) == "auto"
    assert served.attention_on(HOST, "triton", HOST) == "triton"
    assert served.attention_on(cuda, "triton", HOST) == "triton"
    assert served.attention_on(cuda, "triton", cuda) == "triton"


# ---- memory ----


def test_each_device_has_a_budget_of_its_own(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all models have room for the same tokens: for those that fit on every device."""
    free = {HOST: 10_000_000, DEVICE: 10_000_000}
    monkeypatch.setattr("w2s_fast.models.memory.free_bytes", lambda device: free[device])
    base, both = tiny(0), [tiny(2), tiny(3)]
    alone = {kind: kv_tokens_that_fit(own, 10**9) for kind, own in (("one", [base]), ("two", both))}
    options = {"kv_cache_tokens": None, "max_rows": 10**6}
    assert alone["two"] == alone["one"] // 2
    # The base alone has more room than two guides that lie elsewhere.
    engine = engine_of(base, [Guide(*both, device=DEVICE)], HOST, **options)
    assert {model.pool.num_pages for model in models_of(engine)} == {-(-alone["two"] // 4)}
    free[DEVICE] = 40_000_000
    engine = engine_of(tiny(0), [Guide(tiny(2), tiny(3), device=DEVICE)], HOST, **options)
    assert {model.pool.num_pages for model in models_of(engine)} == {-(-alone["one"] // 4)}
    # What is asked for is not measured.
    engine = engine_of(tiny(0), [Guide(tiny(2), None, device=DEVICE)], HOST, kv_cache_tokens=512)
    assert {model.pool.num_pages for model in models_of(engine)} == {128}


def test_passes_are_as_large_as_each_device_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = [torch.device("cuda", i) for i in range(2)]
    models = [mock.Mock(device=device) for device in (cuda[0], cuda[1], HOST, cuda[1])]
    free = {cuda[0]: 64 << 30, cuda[1]: 16 << 30, HOST: 1 << 30}
    seen: list[Any] = []

    def fits(own: Sequence[Any], useful: int, activations: int, sharers: int) -> int:
        seen.append((own, useful, activations))
        return min(useful, {cuda[0]: 1000, cuda[1]: 700, HOST: 800}[own[0].device])

    monkeypatch.setattr(served, "activations_of", lambda _: Activations(1 << 20, 0))
    monkeypatch.setattr(served, "free_bytes", free.__getitem__)
    monkeypatch.setattr(served, "kv_tokens_that_fit", fits)
    monkeypatch.setattr(served, "_useful_tokens", lambda *_: 5000)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    tokens, passes = served._room(models, None, None, 256, None)
    assert tokens == 700 and passes == {cuda[0]: 8192, cuda[1]: 2048, HOST: 2048}
    assert [own for own, *_ in seen] == [[models[0]], [models[1], models[3]], [models[2]]]
    assert [useful for _, useful, _ in seen] == [5000, 1000, 700]
    assert served._room(models, 99, 7, 256, None) == (99, dict.fromkeys(passes, 7))
