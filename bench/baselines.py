"""What the search is measured against: transformers' sampling and beam search, and the search as
released.

Baseline A, :func:`generate_rows`, samples the same number of rows and tokens with transformers'
``generate`` and scores nothing: what the base alone costs.

Baseline B, :func:`released_search`, computes the same search as :mod:`w2s_fast` in the way of the
code that came with the method (arXiv 2405.19262): one prompt at a time; every chunk is a fresh
``generate`` over W * K rows, so prompt and response are run anew in each; then both models of every
guide run prompt and whole response of each row. No keys or values outlive a chunk. Written here
from that description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from w2s_fast.params import SearchParams


class GuideModels(NamedTuple):
    """The two models of a guide, as transformers has them, and its weight."""

    tuned: PreTrainedModel
    untuned: PreTrainedModel
    weight: float = 1.0


@dataclass
class ReleasedRound:
    """The candidates of one round, their scores, and the indices of those kept, best first."""

    candidates: list[list[int]]
    scores: list[float]
    kept: list[int]


@dataclass
class ReleasedResult:
    """The best response, its score, and how it was found."""

    token_ids: list[int]
    score: float
    sampled_tokens: int
    rounds: list[ReleasedRound] = field(default_factory=list)


@torch.inference_mode()
def generate_rows(
    model: PreTrainedModel, prompts: Tensor, new_tokens: int, params: SearchParams
) -> Tensor:
    """Sample exactly ``new_tokens`` tokens behind each prompt: int64 [S, new_tokens].

    Temperature and top-k are those of ``params``; the noise is torch's own. ``generate`` keeps
    keys and values in its cache and runs the attention the model was loaded with (sdpa).

    Args:
        prompts: int64 [S, P], all of one length.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if params.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
        }
    untyped: Any = model
    rows: Tensor = untyped.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        use_cache=True,
        **sampling,
    )
    return rows[:, prompts.shape[1] :]


@torch.inference_mode()
def generate_beams(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int, params: SearchParams
) -> Tensor:
    """Beam search by transformers, of exactly ``new_tokens`` tokens: int64 [W, new_tokens].

    Args:
        prompt: int64 [1, P].
    """
    untyped: Any = model
    rows: Tensor = untyped.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        use_cache=True,
        do_sample=False,
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
    )
    return rows[:, prompt.shape[1] :]


@torch.inference_mode()
def response_scores(guides: Sequence[GuideModels], rows: Tensor, prompt_tokens: int) -> list[float]:
    """The guides' score of each whole response, from one forward of each model over whole rows.

    The forward gives logits of every position, as transformers' does unless told otherwise; only
    those of the response are normalised.

    Args:
        rows: int64 [S, P + T], prompt and response.
    """
    response = rows[:, prompt_tokens:]
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for guide in guides:
        tuned, untuned = (
            model(input_ids=rows, use_cache=False)
            .logits[:, prompt_tokens - 1 : -1]
            .log_softmax(-1)
            .gather(-1, response[..., None])[..., 0]
            for model in (guide.tuned, guide.untuned)
        )
        total += guide.weight * (tuned - untuned).sum(-1, dtype=torch.float64)
    scores: list[float] = total.tolist()
    return scores


def released_search(
    base: PreTrainedModel,
    guides: Sequence[GuideModels],
    prompt: Sequence[int],
    params: SearchParams,
) -> ReleasedResult:
    """Chunk-level beam search for one prompt, without EOS: every response has all its tokens.

    Args:
        params: of method ``"cbs"``; the noise is torch's own, so ``seed`` is not read.
    """
    rows_per_round = params.beam_width * params.successors
    responses: list[list[int]] = [[]] * params.beam_width
    result = ReleasedResult([], 0.0, sampled_tokens=0)
    for length in range(0, params.max_new_tokens, params.tokens_per_round):
        chunk = min(params.tokens_per_round, params.max_new_tokens - length)
        parents = torch.tensor([[*prompt, *response] for response in responses], device=base.device)
        parents = parents.repeat_interleave(params.successors, dim=0)
        rows = torch.cat([parents, generate_rows(base, parents, chunk, params)], dim=1)
        scores = response_scores(guides, rows, len(prompt))
        kept = sorted(range(rows_per_round), key=lambda i: (-scores[i], i))[: params.beam_width]
        candidates: list[list[int]] = rows[:, len(prompt) :].tolist()
        result.rounds.append(ReleasedRound(candidates, scores, kept))
        result.sampled_tokens += rows_per_round * chunk
        responses = [candidates[i] for i in kept]
        result.token_ids, result.score = responses[0], scores[kept[0]]
    return result
