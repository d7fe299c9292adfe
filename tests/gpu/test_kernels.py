"""Every operator on the device, against float64, in every dtype and at full vocabularies.

An operator may be wrong by no more than the plain torch version plus 1e-5, 1e-3 or 1e-2 in
float32, float16 and bfloat16.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.beams import RoundOfOne, check, run
from tests.kernels.forests import Forest, Request, attend, make_forest
from tests.kernels.score_rounds import DrawnRound, Spare, assert_same_as_apart, call_of, own_tokens
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.kernels.fuse_logits import fuse_logits
from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.linear_logprob_partials import linear_logprob_partials
from w2s_fast.kernels.sample_tokens import sample_tokens
from w2s_fast.kernels.score_select import ScoreSelection, score_select
from w2s_fast.kernels.token_logprob import token_logprob

DTYPES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
VOCABULARIES = [1, 17, 50_257, 128_256]


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("rows", [1, 16, 200])
def test_token_logprob_is_as_exact_as_torch(dtype: torch.dtype, vocab: int, rows: int) -> None:
    logits = (torch.randn(rows, vocab, device="cuda") * 5).to(dtype)
    tokens = torch.randint(0, vocab, (rows,), device="cuda")
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    plain = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert worst(token_logprob(logits, tokens), exact) <= worst(plain, exact) + DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "width"), [(17, 32), (50_257, 768), (128_256, 4_096)])
@pytest.mark.parametrize("rows", [1, 16, 100, 300])
def test_linear_logprob_is_as_exact_as_torch(
    dtype: torch.dtype, vocab: int, width: int, rows: int
) -> None:
    hidden = torch.randn(rows, width, device="cuda").to(dtype)
    # Drawn as it is: of the largest, several processes beside each other hold one.
    weight = torch.randn(vocab, width, dtype=dtype, device="cuda").mul_(3 * width**-0.5)
    tokens = torch.randint(0, vocab, (rows,), device="cuda")
    logits = [hidden.double() @ part.double().T for part in weight.split(8192)]
    exact = torch.cat(logits, 1).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    plain = (hidden @ weight.T).float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    found = linear_logprob(hidden, weight, tokens)
    assert worst(found, exact) <= worst(plain, exact) + DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_sample_tokens_draws_what_the_cpu_draws(dtype: torch.dtype, vocab: int) -> None:
    rows = 256
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator) * 4).to(dtype)
    row = torch.arange(rows)
    settings = (
        torch.tensor([0.0, 0.3, 0.7, 1.0, 1.5])[row % 5],
        torch.tensor([0, 1, 50, 1000])[row % 4],
        torch.tensor([1.0, 0.95, 0.3], dtype=torch.float64)[row % 3],
        torch.tensor([0.0, 0.05], dtype=torch.float64)[row % 2],
        row * 2**33,
        row % 16,
        row // 16,
    )
    on_cpu, logprobs = sample_tokens(logits, *settings)
    on_gpu, found = sample_tokens(logits.cuda(), *(s.cuda() for s in settings))
    # The two exponential functions differ in their last bits. Without filters that moves 1e-5 to
    # 4e-4 of the draws, as measured with a GPU's rounding: 0.1 of these 256 at most.
    assert int((on_cpu != on_gpu.cpu()).sum()) <= 1
    same = on_cpu == on_gpu.cpu()
    assert torch.allclose(logprobs[same], found.cpu()[same], atol=1e-4)


@pytest.mark.parametrize("candidates", [2, 16, 100, 1000])
def test_select_beams_agrees_with_the_naive_selection(candidates: int) -> None:
    generator = torch.Generator().manual_seed(candidates)
    tuned, untuned = -torch.rand(2, candidates, 3, generator=generator).double()
    chunks = torch.randint(0, 3, (candidates, 3), generator=generator).tolist()
    r = RoundOfOne(
        chunks=[tuple(c) for c in chunks],
        siblings=[c % 3 for c in range(candidates)],
        previous=[0.5 * (c % 2) for c in range(candidates)],
        before=[2] * candidates,
        parents=list(range(candidates)),
        tuned=[tuned.float().tolist()],
        untuned=[untuned.float().tolist()],
        width=4,
        mean=False,
        dedup=True,
    )
    check([r], [1.0])


@pytest.mark.parametrize(("requests", "candidates"), [(1, 16), (64, 16), (2, 300)])
def test_score_select_in_a_graph_is_the_operators_one_after_the_other(
    requests: int, candidates: int
) -> None:
    """Recorded with other values and spare places, replayed with these; bit for bit."""
    draw = torch.Generator().manual_seed(requests)
    rounds = [
        DrawnRound(
            RoundOfOne(
                chunks=[
                    tuple(c) for c in torch.randint(6, (candidates, 5), generator=draw).tolist()
                ],
                siblings=[c % 3 for c in range(candidates)],
                previous=[0.1 * (c % 2) for c in range(candidates)],
                before=[2] * candidates,
                parents=list(range(candidates)),
                tuned=[[[0.0] * 5] * candidates],
                untuned=[[[0.0] * 5] * candidates],
                width=4,
                mean=bool(i % 2),
                dedup=bool(i % 3),
            ),
            stops=[5, 4][: i % 3],
            base=[[-1.0] * 5] * candidates,
        )
        for i in range(requests)
    ]
    spare = Spare(rounds=3, candidates=20, tokens=50, stops=2, max_candidates=9, max_width=1)
    tokens = call_of(rounds, [0.3], spare).arguments[2].clamp(min=0)
    hidden = torch.randn(len(tokens), 768, device="cuda").bfloat16()
    heads = [(torch.randn(50_257, 768, device="cuda") * 0.1).bfloat16() for _ in range(2)]
    guide = [linear_logprob_partials(hidden, head, tokens) for head in heads]
    call = call_of(rounds, [0.3], spare, [(guide[0], guide[1])])

    own = own_tokens(rounds)
    tuned, untuned = (linear_logprob(hidden, head, tokens)[None, own] for head in heads)
    apart = run([r.cut() for r in rounds], [0.3], logprobs=(tuned, untuned))
    assert_same_as_apart(call.run(), rounds, apart)

    arguments = list(call.arguments)
    drawn = arguments[2].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        arguments[2].fill_(1)
        with torch.cuda.graph(graph, stream=side):
            packed = score_select(*arguments)
        arguments[2].copy_(drawn)
        graph.replay()
    side.synchronize()
    assert_same_as_apart(ScoreSelection.unpack(packed.cpu(), *call.size), rounds, apart)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fuse_logits_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    base, tuned, untuned = (torch.randn(64, 50_257, device="cuda").to(dtype) for _ in range(3))
    beta = torch.rand(1, 64, device="cuda")
    exact = base.double() + beta[0, :, None].double() * (tuned.double() - untuned.double())
    plain = base.float() + beta[0, :, None] * (tuned.float() - untuned.float())
    found = fuse_logits(base, tuned[None], untuned[None], beta)
    assert worst(found, exact) <= worst(plain, exact) + DTYPES[dtype]


def dense(forest: Forest, plan: KernelPlan, dtype: torch.dtype, window: int | None) -> Tensor:
    """Every row against its own keys, gathered, with products in ``dtype``."""
    out = []
    size, group = forest.pool.page_size, forest.queries.shape[1] // forest.pool.kv.shape[4]
    table = forest.pool.page_table(forest.slots).long()
    queries = forest.queries.split(forest.counts.tolist())
    for row, (q, length) in enumerate(zip(queries, plan.lengths.tolist())):
        t = torch.arange(length, device="cuda")
        kv = forest.pool.kv[0][:, table[row, t // size], t % size].to(dtype)
        k, v = kv.repeat_interleave(group, dim=2).transpose(1, 2)  # [H, L, D]
        x = (q.to(dtype).transpose(0, 1) @ k.mT).to(torch.promote_types(dtype, torch.float32))
        distance = t[length - len(q) :, None] - t
        seen = (distance >= 0) & (distance < (window or length))
        weights = (x * q.shape[2] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        out.append((weights.to(dtype) @ v).transpose(0, 1))
    return torch.cat(out)


# (H, Hkv, D): gpt2, a 7B of one head a group, an 8B, a gemma, and sizes that are no power of two.
SHAPES = [(12, 12, 64), (32, 32, 128), (32, 8, 128), (8, 4, 256), (32, 32, 80), (32, 8, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("new", [1, 5, 16])
@pytest.mark.parametrize("window", [None, 700])
def test_attention_over_shared_segments_is_as_exact_as_torch(
    window: int | None, new: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    requests = [
        Request(1500, ((4, 30, 60), (4, 0, 20)), (new, new)),
        Request(90, ((2, 3, 40), (3, 1, 1)), (new, new)),
        Request(777, (), (1, new), shares=False),
    ]
    forest = make_forest(requests, *shape, dtype=dtype, device="cuda")
    plan = forest.plan()
    assert plan.shared is not None
    scale = shape[2] ** -0.5
    exact = dense(forest, plan, torch.float64, window)
    plain = dense(forest, plan, dtype, window)
    found = attend(forest, plan, scale=scale, window=window).cuda()
    assert worst(found, exact) <= worst(plain, exact) + DTYPES[dtype]
    again = attend(forest, plan, scale=scale, window=window).cuda()
    assert torch.equal(found, again)


@pytest.mark.parametrize("window", [None, 700])
def test_a_row_has_the_same_bits_in_float32_whichever_rows_run(window: int | None) -> None:
    requests = [
        Request(1500, ((4, 30, 60), (4, 0, 20))),
        Request(600, ((2, 20, 40), (3, 1, 1)), (1, 9)),
        Request(1100, shares=False),
    ]
    forest = make_forest(requests, 32, 8, 128, device="cuda")
    rule = {"scale": 128**-0.5, "window": window}
    everyone = attend(forest, forest.plan(), **rule).split(forest.counts.tolist())
    for rows in (
        np.flatnonzero(forest.request == 1),
        np.argsort(-forest.request, kind="stable"),
        np.arange(0, len(forest.slots), 3),
        np.array([5]),
    ):
        got = attend(forest, forest.plan(rows), forest.queries_of(rows), **rule)
        assert torch.equal(got, torch.cat([everyone[row] for row in rows]))
