"""The benchmarks' logic, in a dry run on the CPU: every case runs, and the report is whole.

The baselines of the search are compared with the tests' reference.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch

import bench.cpu_attention
import bench.host
import bench.remote
import bench.search
import bench.search_cases
import bench.threads
from bench.baselines import GuideModels, ReleasedResult, generate_rows, released_search
from bench.host_engine import Clock
from bench.search import Outcome, Timing
from bench.search_cases import BATCH, ENGINE, GENERATE, Bench, cases
from bench.search_memory import measure
from tests.support.reference import Reference, ReferenceGuide
from tests.support.tiny_models import VOCABULARY, Triple, tiny_triple
from w2s_fast import SearchParams

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.thorough
def test_a_quick_run_measures_every_ratio_of_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "search.json"
    options = ["--quick", "--repeats", "2", "--no-memory", "--out", str(out)]
    assert bench.search.main(options) == 0
    found = json.loads(out.read_text())
    assert {"cpu", "cores", "threads", "torch", "transformers", "commit", "date"} <= set(found)
    assert found["command"].startswith("python -m bench.search --quick")
    ratios = {
        (case["name"], ratio["name"], ratio["target"])
        for case in found["cases"]
        for ratio in case["ratios"]
    }
    assert ratios == {
        ("small-guides", "w2s-fast / A", "<= 0.9"),
        ("small-guides", "B / w2s-fast", ">= 4"),
        ("same-size-guides", "w2s-fast / A", "<= 0.95"),
        ("same-size-guides", "B / w2s-fast", ">= 16"),
        ("batch", "tokens/s of 8 requests / of 1", ">= 1.8"),
        ("many-requests", "tokens/s of 64 requests / of 1", ">= 4"),
        ("sample", "w2s-fast / A", "<= 0.85"),
        ("fusion", "w2s-fast / A", "<= 1"),
        ("beam", "w2s-fast / C", "<= 0.6"),
        ("beam-long-prompt", "w2s-fast / C", "<= 0.6"),
    }
    for case in found["cases"]:
        assert all(len(variant["seconds"]) == 2 for variant in case["variants"].values())
        assert all(value > 0 for ratio in case["ratios"] for value in ratio["values"])
    printed = capsys.readouterr().out
    assert all(name in printed for name, _, _ in ratios)


def test_a_ratio_compares_seconds_a_token_within_a_turn() -> None:
    case = next(case for case in cases(quick=True) if case.name == "batch")
    timings = {
        ENGINE: Timing([2.0, 3.0], [4.0, 5.0], tokens=100),
        BATCH: Timing([4.0, 12.0], [8.0, 20.0], tokens=800),
    }
    (ratio,) = case.ratios
    outcome = Outcome(case, timings, memory=None)
    assert outcome.ratio(ratio) == [4.0, 2.0]
    assert outcome.cpu_ratio(ratio) == [4.0, 2.0]
    assert ratio.met(1.8) and not ratio.met(1.79)


def test_a_run_that_samples_too_few_tokens_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench.search_cases,
        "generate_rows",
        lambda model, prompts, new_tokens, params: generate_rows(
            model, prompts, new_tokens - 1, params
        ),
    )
    with pytest.raises(RuntimeError, match="A: generate sampled 176 tokens; promised: 192"):
        Bench(cases(quick=True)[0]).run(GENERATE)


def test_a_profile_names_the_parts_of_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.search.main(["--quick", "--profile", "--only", "small-guides"]) == 0
    printed = capsys.readouterr().out
    for part in ("base, decode step", "base, LM head", "sampling", "guides, body", "selection"):
        assert part in printed
    assert "aten::addmm" in printed


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_counts_weights_and_pages() -> None:
    case = cases(quick=True)[0]
    memory = measure(case, quick=True)
    assert memory is not None
    # float32; a GPT-2 of l layers and width d has d * (V + 1024) + l * (12 d^2 + 13 d) + 2 d.
    sizes = [(2, 32), (1, 16), (1, 16)]
    numbers = [d * (211 + 1024) + n * (12 * d * d + 13 * d) + 2 * d for n, d in sizes]
    assert memory.weights == 4 * sum(numbers)
    assert memory.pages > 0
    assert memory.peak >= memory.models >= memory.imports > 0


MANY = SearchParams(
    beam_width=3, successors=2, chunk_length=4, max_new_tokens=10, temperature=1.3, top_k=0
)


@pytest.fixture(scope="module")
def tiny() -> Triple:
    return tiny_triple(eos=())


def reference(tiny: Triple) -> Reference:
    guides = [ReferenceGuide(tiny.tuned, tiny.untuned, 0.5)]
    return Reference(tiny.base, guides, vocab_size=VOCABULARY, eos_token_ids=[])


def released(tiny: Triple, prompt: list[int], params: SearchParams) -> ReleasedResult:
    return released_search(tiny.base, [GuideModels(tiny.tuned, tiny.untuned, 0.5)], prompt, params)


def test_the_released_search_scores_and_keeps_what_the_reference_would(tiny: Triple) -> None:
    prompt = [3, 1, 4]
    result = released(tiny, prompt, MANY)
    parents: list[list[int]] = [[]] * 3
    for done, length in zip(result.rounds, (4, 8, 10), strict=True):
        assert [len(tokens) for tokens in done.candidates] == [length] * 6
        begins = [parent for parent in parents for _ in range(2)]
        assert all(c[: len(b)] == b for c, b in zip(done.candidates, begins))
        expected = [
            math.fsum(reference(tiny).token_scores([prompt], tokens)) for tokens in done.candidates
        ]
        assert done.scores == pytest.approx(expected, abs=1e-5)
        assert done.kept == sorted(range(6), key=lambda i: -expected[i])[:3]
        parents = [done.candidates[i] for i in done.kept]
    assert result.token_ids == parents[0]
    assert result.score == done.scores[done.kept[0]]
    assert result.sampled_tokens == 6 * 10
    assert len({tuple(tokens) for tokens in done.candidates}) > 1


def test_the_released_search_is_greedy_decoding_where_nothing_is_searched(tiny: Triple) -> None:
    params = dataclasses.replace(MANY, beam_width=1, successors=1, temperature=0.0)
    expected = reference(tiny).search([3, 1, 4], params).hypotheses[0]
    assert released(tiny, [3, 1, 4], params).token_ids == expected.token_ids


def test_transformers_samples_the_promised_tokens_even_where_eos_is_likely() -> None:
    model = tiny_triple(eos=(0, 6, 13)).base
    rows = generate_rows(model, torch.tensor([[3, 1, 4]]).expand(16, -1), 11, MANY)
    assert rows.shape == (16, 11)
    assert len({tuple(row) for row in rows.tolist()}) > 1


def test_a_dry_run_times_the_cpus_attention_with_and_without_a_tree(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert bench.cpu_attention.main(["--dry-run", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["what"], row["requests"]) for row in rows] == [
        ("decode", 1),
        ("append", 1),
        ("decode", 2),
        ("append", 2),
    ]
    assert all(min(row["tree_ms"], row["flat_ms"], row["dense_ms"]) > 0 for row in rows)


def test_a_quick_run_times_the_host_and_counts_what_it_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "host.json"
    assert bench.host.main(["--quick", "--turns", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {"cpu", "cores", "threads", "torch", "transformers", "commit", "date"} <= set(found)
    one, two = found["sizes"]
    assert [one["requests"], two["requests"]] == [1, 2]
    for size in (one, two):
        short, long = size["lengths"]
        assert short["length"] == 18 and long["length"] >= 30 and short["of_shortest"] == 1
        assert all(
            len(at["seconds"]) == bench.host.TURN and min(at["seconds"]) > 0
            for at in size["lengths"]
        )
        assert short["us_per_row"] == pytest.approx(1e3 * short["ms"] / (16 * size["requests"]))
        assert size["counts"]["replays"] == 4 and size["counts"]["waits"] >= 1
    same = ("waits", "reads", "copies", "replays")
    assert [one["counts"][name] for name in same] == [two["counts"][name] for name in same]
    printed = capsys.readouterr().out
    assert "us a row" in printed and "other launches" in printed


def test_the_hosts_clock_stands_still_where_a_device_would_compute() -> None:
    clock = Clock()
    busy = clock.stopped(lambda: [clock.stopped(spin)(), clock.now()])

    def spin() -> None:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass

    begin = clock.now()
    _, within = busy()
    assert within - begin < 0.01 and clock.now() - begin < 0.01
    spin()
    assert clock.now() - begin >= 0.0199


def test_a_profile_of_the_host_names_its_functions(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--profile", "--requests", "1", "--turns", "1"]
    assert bench.host.main(options) == 0
    printed = capsys.readouterr().out
    assert "(advance)" in printed and "cumulative" in printed


def test_a_search_that_takes_too_long_is_measured_where_it_has_come_to() -> None:
    size = bench.host.Size(requests=1, chunk=3, prompt=20, longest=60)
    (at,) = bench.host.measure(size, [48, 51], turns=1, budget=0)
    assert (at.length, len(at.seconds)) == (0, bench.host.TURN)


@pytest.mark.thorough
def test_threads_are_measured_beside_a_neighbour(tmp_path: Path) -> None:
    if bench.machine.cores() < 2:
        pytest.skip("one core")
    out = tmp_path / "threads.json"
    assert bench.threads.main(["--quick", "--turns", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["complete"] and set(found["targets"]) < set(found["ratios"])
    assert len(found["seconds"]) == 4 and all(s > 0 for s in found["seconds"].values())


@pytest.mark.thorough
def test_a_base_behind_servers_is_held_against_the_same_here(tmp_path: Path) -> None:
    out = tmp_path / "remote.json"
    assert bench.remote.main(["--quick", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["complete"]
    here, own, theirs = found["rows"]
    assert here["difference"] is None and here["requests"] == 0
    assert own["requests"] < theirs["requests"]  # which gives one sample a request
    assert all(row["prompts"] == 2 for row in found["rows"])
