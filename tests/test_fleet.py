"""A fleet on paper, held to what can be worked out by hand, and to queueing theory.

docs/fleet.md shows the tables that stand in bench/results/fleet.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bench.fleet
from bench import fleet_setups as setups
from bench import random_models as shapes
from bench.fleet import PASS_TOKENS, capacity, replica_of
from bench.fleet_setups import Model, Setup, interpolated
from bench.fleet_simulation import (
    LOAD,
    PREFIX,
    RANDOM,
    ROUTERS,
    Arrivals,
    PrefixCache,
    Replica,
    Router,
    Traffic,
    arrivals,
    popularity,
    simulate,
    summary,
)
from bench.fleet_simulation import Outcome as Seen
from bench.fleet_tables import lines, pays_from

ROOT = Path(__file__).parents[1]
XL, EIGHT, SEVENTY = setups.gpt2_xl(), setups.eight(), setups.seventy()
FEW = Traffic(groups=20, shared=48, own=16, mean_answer=10, most_answer=40)
# A round of n requests takes 1 + n / 10 seconds, and a prompt 1/1000 a token.
SLOW = Replica(
    [0.0, *(1 + n / 10 for n in range(1, 5))], lambda tokens: tokens / 1000, 5, 100, 300
)  # fmt: skip


def run(
    router: str, *, replicas: int = 4, traffic: Traffic = FEW, rate: float = 1.0, seed: int = 0
) -> tuple[Arrivals, Seen]:
    asked = arrivals(traffic, rate, 400, seed)
    return asked, simulate(SLOW, replicas, traffic, asked, router, seed=seed)


def asked_for(*requests: tuple[float, int, int]) -> Arrivals:
    """Of (when, group, tokens to write)."""
    times, groups, answers = zip(*requests)
    return Arrivals(np.array(times, dtype=float), np.array(groups), np.array(answers))


def alone(requests: Arrivals, replica: Replica = SLOW, **options: float) -> Seen:
    return simulate(replica, 1, FEW, requests, LOAD, warm=False, **options)  # type: ignore[arg-type]


# The simulation


def test_one_replica_does_what_was_worked_out_by_hand() -> None:
    # 64 tokens of a prompt are 64 ms, 16 where its beginning is cached.
    requests = asked_for((0, 7, 12), (0.5, 7, 3), (10, 8, 5))
    seen = alone(requests)
    first = 0.064 + 1.1  # alone
    second = 0.016 + 1.2  # with the other one, which is done after it
    third = 1.1
    assert seen.finished == pytest.approx(
        [first + second + third, first + second, 10 + 0.064 + 1.1]
    )
    assert seen.entered == pytest.approx([0, first, 10])
    assert seen.cached.tolist() == [0, 48, 0]


def test_who_finds_no_place_waits_until_one_leaves() -> None:
    requests = asked_for(*[(0.0, group, 5) for group in range(6)])
    seen = alone(requests)
    # The first begins at once, by itself. Of the others a pass takes 100 tokens: one prompt.
    ends = np.cumsum([0.064 + 1.1] * 6)
    assert seen.finished == pytest.approx(ends)
    wide = replace(SLOW, pass_tokens=1000)
    seen = alone(requests, wide)
    four = 1.164 + 4 * 0.064 + 1.4  # no more than four run at once
    assert seen.finished == pytest.approx([1.164, four, four, four, four, four + 0.064 + 1.1])


def test_a_router_decides_about_one_request_after_the_other() -> None:
    requests = asked_for((0, 1, 5), (0, 2, 5), (0, 3, 5))
    seen = simulate(SLOW, 3, FEW, requests, PREFIX, decision_s=0.25, warm=False)
    assert len(set(seen.replicas.tolist())) >= 2
    assert seen.entered[0] == 0.25
    assert sorted(seen.entered)[1] == 0.5


@pytest.mark.parametrize("router", ROUTERS)
def test_all_that_came_leave_again_and_nobody_overtakes_time(router: str) -> None:
    asked, seen = run(router, rate=3)
    assert np.isfinite(seen.finished).all()
    assert (seen.entered >= asked.times).all()
    least = -(-asked.answers // SLOW.chunk) * SLOW.round_s[1]
    assert (seen.finished - seen.entered >= least - 1e-9).all()
    assert set(seen.replicas.tolist()) == set(range(4))
    assert set(seen.cached.tolist()) <= {0, FEW.shared}


@pytest.mark.parametrize("router", ROUTERS)
def test_the_same_seed_gives_the_same_and_another_one_another(router: str) -> None:
    (_, first), (_, again), (_, other) = run(router), run(router), run(router, seed=1)
    assert first.finished.tolist() == again.finished.tolist()
    assert first.replicas.tolist() == again.replicas.tolist()
    assert first.finished.tolist() != other.finished.tolist()


@pytest.mark.parametrize("router", ROUTERS)
def test_requests_at_replicas_are_rate_times_time(router: str) -> None:
    """Little's law: the left side is counted event by event, the right one request by request."""
    asked, seen = run(router, rate=2)
    found = summary(asked, seen, FEW.prompt)
    span = seen.finished.max() - asked.times[0]
    rate = len(asked.times) / span
    assert found.at_replicas == pytest.approx(rate * (seen.finished - asked.times).mean())


def test_one_place_and_rounds_of_one_length_wait_as_queueing_theory_says() -> None:
    """M/D/1: the mean wait is rho / (2 (1 - rho)) services."""
    one = Replica([0.0, 1.0], lambda tokens: 0.0, chunk=40)
    asked = arrivals(FEW, 0.6, 30_000, seed=3)
    seen = simulate(one, 1, FEW, asked, RANDOM, warm=False)
    assert (seen.entered - asked.times).mean() == pytest.approx(0.6 / 0.8, rel=0.05)


def test_less_load_more_replicas_and_more_cache_never_make_requests_wait_longer() -> None:
    def mean(found: tuple[Arrivals, Seen]) -> float:
        asked, seen = found
        return float((seen.finished - asked.times).mean())

    by_rate = [mean(run(LOAD, rate=rate)) for rate in (0.2, 1, 3, 9)]
    assert by_rate == sorted(by_rate)
    by_number = [mean(run(LOAD, replicas=number, rate=3)) for number in (16, 8, 4, 2)]
    assert by_number == sorted(by_number)
    hits = []
    for cache in (0, 100, 1000, 10_000):
        asked = arrivals(FEW, 1, 400, seed=0)
        seen = simulate(replace(SLOW, cache_tokens=cache), 4, FEW, asked, RANDOM)
        hits.append(int(seen.cached.sum()))
    assert hits == sorted(hits) and hits[0] == 0 < hits[-1]


def test_load_balances_and_prefixes_find_more() -> None:
    traffic = replace(FEW, groups=60)
    found = {router: run(router, replicas=8, traffic=traffic, rate=4) for router in ROUTERS}
    cached = {router: int(seen.cached.sum()) for router, (_, seen) in found.items()}
    assert cached[PREFIX] > 1.3 * max(cached[RANDOM], cached[LOAD])
    p99 = {router: summary(*both, FEW.prompt).p99 for router, both in found.items()}
    assert p99[LOAD] < p99[RANDOM]


@pytest.mark.parametrize("router", ROUTERS)
def test_where_nothing_is_shared_nothing_is_found(router: str) -> None:
    _, seen = run(router, traffic=replace(FEW, shared=0, own=64))
    assert not seen.cached.any()


def test_a_summary_counts_what_is_written_while_it_looks() -> None:
    requests = asked_for((0, 0, 10), (4, 0, 20), (10, 0, 30))
    seen = Seen(
        entered=np.array([0.0, 4.0, 10.0]), finished=np.array([5.0, 8.0, 12.0]),
        replicas=np.zeros(3, int), cached=np.array([0, 16, 0]), request_seconds=24.0,
    )  # fmt: skip
    found = summary(requests, seen, prompt=64, begin=0.4, end=0.9)  # from 4 to 9
    assert found.tokens_per_s == pytest.approx((10 / 5 + 20) / 5)
    assert (found.p50, found.p99) == (4.0, 4.0)
    assert found.cached == 0.25 and found.at_replicas == 2


# Its parts


def test_a_cache_keeps_what_was_used_last_and_lets_go_of_ends_first() -> None:
    cache = PrefixCache(130)
    assert cache.enter(1, 48, 16) == 0
    assert cache.enter(2, 48, 16) == 0
    assert cache.enter(1, 48, 1) == 48  # 129 tokens
    assert cache.enter(2, 48, 16) == 48  # the first end went
    assert cache.enter(3, 48, 0) == 0  # the other ends, and 1
    assert cache.enter(2, 48, 0) == 48
    assert cache.enter(1, 48, 0) == 0
    nothing = PrefixCache(0)
    assert nothing.enter(1, 48, 16) == nothing.enter(1, 48, 16) == 0


def test_a_group_stays_where_it_is_until_that_replica_has_too_much() -> None:
    loads = [0] * 8
    choose = Router(PREFIX, loads, seed=0, bound=1.25, slack=2).choose
    home = choose(5, 0)
    loads[home] = 2
    assert choose(5, 8) == home  # 2 < 1.25 + 2
    loads[home] = 4
    away = choose(5, 8)
    assert away != home
    loads[away] = 2
    assert choose(5, 8) == away  # there it is as well, from now on
    loads[home] = 0
    assert choose(5, 8) == home


def test_of_two_the_less_loaded_is_taken() -> None:
    loads = [5, 0]
    choose = Router(LOAD, loads, seed=0).choose
    taken = [choose(0, 5) for _ in range(400)]
    # Both are the loaded one a quarter of the time.
    assert 0.15 < taken.count(0) / 400 < 0.35


def test_traffic_is_what_it_says() -> None:
    traffic = Traffic(groups=50, zipf=1.0, mean_answer=100, most_answer=300)
    chances = popularity(traffic)
    assert chances.sum() == pytest.approx(1)
    assert chances[0] == pytest.approx(4 * chances[3])
    asked = arrivals(traffic, 20, 50_000, seed=0)
    assert np.diff(asked.times).mean() == pytest.approx(1 / 20, rel=0.02)
    assert np.diff(asked.times).std() == pytest.approx(1 / 20, rel=0.02)
    assert (asked.groups == 0).mean() == pytest.approx(chances[0], rel=0.03)
    assert asked.answers.mean() == pytest.approx(traffic.mean_tokens, rel=0.02)
    rounds = -(-asked.answers // 7)
    assert rounds.mean() == pytest.approx(traffic.mean_rounds(7), rel=0.02)
    # (1 - q^300) / (1 - q), q = 0.99
    assert traffic.mean_tokens == pytest.approx(100 * (1 - 0.99**300))


# Setups


def test_between_two_measured_numbers_times_lie_on_a_line() -> None:
    table = {1: 20.0, 16: 50.0, 64: 146.0}
    assert [interpolated(table, n) for n in (1, 6, 16, 40, 64)] == [20, 30, 50, 98, 146]
    for outside in (0, 65):
        with pytest.raises(ValueError, match=f"{outside} requests; known: 1 to 64"):
            interpolated(table, outside)


def test_rounds_are_those_that_were_measured() -> None:
    assert {n: round(ms, 1) for n, ms in XL.rounds_ms.items()} == {1: 20.3, 16: 41.5, 64: 130.8}
    assert {n: round(ms) for n, ms in EIGHT.rounds_ms.items()} == {1: 278, 16: 837}
    assert XL.most == 64 and EIGHT.most == 16


def test_models_are_as_large_as_they_are() -> None:
    xl, small, eight = (Model.of(c) for c in (shapes.GPT2_XL, shapes.GPT2, shapes.LARGE))
    assert [m.weights.parameters for m in (xl, small, eight)] == [
        1_555_972_800, 123_653_376, 7_504_924_672,
    ]  # fmt: skip
    assert [m.weights.kv_bytes for m in (xl, small, eight)] == [307_200, 36_864, 131_072]
    assert [m.held for m in (xl, eight)] == [1_557_611_200, 8_030_261_248]
    assert SEVENTY.base.held == 70_553_706_496  # as published
    assert SEVENTY.base.weights.kv_bytes == 2 * 80 * 8 * 128 * 2


@pytest.mark.parametrize(("setup", "rounds"), [(XL, 10), (EIGHT, 3)])
def test_limits_are_those_of_the_report_that_rounds_come_from(setup: Setup, rounds: int) -> None:
    path = ROOT / "bench" / "results" / setup.source
    rows, limits = setups.measured_rows(path, setup.name)
    for requests, row in rows.items():
        load = setups.Load(requests, setups.PROMPT, chunk=setup.chunk)
        before = setups.histories(setup.chunk, rounds)
        found = setups.limit_ms(setup.models, load, before, limits)
        assert found == pytest.approx(row["limit_ms"])


def test_a_request_takes_prompt_hypotheses_and_candidates() -> None:
    assert XL.request_parts(512, 128) == (512, 4 * 128, 16 * 5)
    assert XL.kv_bytes == 307_200 + 2 * 36_864
    # 140 GB, 8B under two 7B of a vocabulary of 32,768, prompts and answers of 512.
    seven = Model.of(shapes.llama(32, 4096, 32, 8, 14_336, 32_768))
    whole = replace(EIGHT, guides=(seven, seven), memory=140e9 / 0.9)
    assert whole.page_tokens // whole.request_tokens(512, 512) == 79
    assert SEVENTY.weight_bytes == pytest.approx(2 * (70.55e9 + 2 * 8.03e9), rel=1e-3)
    assert EIGHT.cache_tokens(512, 128) == EIGHT.page_tokens - 16 * (512 + 512 + 480)


def test_a_prompt_takes_weights_or_products_and_the_share_was_measured() -> None:
    assert 0.2 < XL.prompt_share < 1 and 0.5 < EIGHT.prompt_share < 1
    assert EIGHT.prompt_seconds(0) == 0
    read = 3 * 2 * 7_504_924_672 / EIGHT.limits.bandwidth
    assert EIGHT.prompt_seconds(1) == pytest.approx(read / EIGHT.prompt_share)
    products = 3 * 2 * 7_504_924_672 * 8192 / EIGHT.limits.rate
    assert EIGHT.prompt_seconds(8192) == pytest.approx(products / EIGHT.prompt_share)


def test_the_formula_meets_what_was_measured_and_grows_with_all_it_should() -> None:
    formula = setups.eight_by_formula()
    assert formula.rounds_ms[16] == pytest.approx(EIGHT.rounds_ms[16])
    assert formula.rounds_ms[1] == pytest.approx(EIGHT.rounds_ms[1], rel=0.06)
    for found in (formula, SEVENTY):
        assert list(found.rounds_ms.values()) == sorted(found.rounds_ms.values())
    longer = setups.eight_by_formula(8192)
    assert longer.most < formula.most == 64
    assert longer.rounds_ms[4] > formula.rounds_ms[4]
    assert longer.most * longer.request_tokens(8192, 90) <= longer.page_tokens // 2


def test_what_a_token_costs() -> None:
    # 2,000 tokens/s on one GPU of 3.6 dollars an hour: a dollar is 1,000 s.
    assert setups.cost_of(1000, 2000, 1, 3.6) == pytest.approx(0.0005)
    assert setups.cost_of(1000, 2000, 4, 3.6) == pytest.approx(0.002)


def test_capacity_is_what_comes_out_when_more_is_asked() -> None:
    traffic = Traffic(groups=50)
    rate = capacity(XL, traffic)
    seconds = 0.1307529641 / 64 * traffic.mean_rounds(5) + XL.prompt_seconds(PASS_TOKENS) / 16
    assert 1 / rate == pytest.approx(seconds)
    asked = arrivals(traffic, 1.5 * 2 * rate, 1500, seed=0)
    cold = replica_of(XL, traffic, cache_tokens=0)
    seen = simulate(cold, 2, traffic, asked, LOAD)
    found = summary(asked, seen, traffic.prompt)
    assert found.tokens_per_s == pytest.approx(2 * rate * traffic.mean_tokens, rel=0.03)


# The command


def gains(*found: tuple[int, float]) -> Sequence[dict[str, float]]:
    return [{"shared": shared, "gain": gain} for shared, gain in found]


def test_prefixes_pay_from_where_they_do_and_do_so_ever_after() -> None:
    assert pays_from(gains((0, 0.0), (128, 0.02), (256, 0.03))) == 128
    assert pays_from(gains((256, 0.03), (128, 0.005), (0, 0.02))) == 256
    assert pays_from(gains((0, 0.0), (256, 0.009))) is None


def test_a_quick_run_says_all_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "fleet.json", tmp_path / "fleet.svg"
    options = ["--quick", "--price", "2", "--out", str(out), "--plot", str(picture)]
    assert bench.fleet.main(options) == 0
    found = json.loads(out.read_text())
    assert found["complete"] and found["command"].startswith("python -m bench.fleet --quick")
    assert found["assumed"]["price"] == 2
    assert {row["setup"] for row in found["scaling"]} == {"gpt2-xl", "8B", "70B"}
    assert all(row["tokens_per_s"] > 0 for row in found["scaling"])
    assert statistics.fmean(row["cached_by_prefix"] for row in found["sharing"]) > 0
    printed = capsys.readouterr().out
    assert printed.splitlines() == lines(found)
    assert "<svg" in picture.read_text() and "<dc:date>" not in picture.read_text()


def test_the_page_shows_the_tables_of_the_report() -> None:
    report = json.loads((ROOT / "bench" / "results" / "fleet.json").read_text())
    page = (ROOT / "docs" / "fleet.md").read_text().splitlines()
    missing = [line for line in lines(report) if line.startswith("|") and line not in page]
    assert report["complete"] and not missing
