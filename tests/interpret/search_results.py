"""Searches over tiny models, as JSON: python -m tests.interpret.search_results

Run in two processes, with the kernels interpreted and with torch, it shows whether a search finds
the same on both.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.support.tiny_models import tiny_model
from w2s_fast import Engine, Guide, SearchParams

REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    ([1, 2, 3], {"beam_width": 2, "successors": 3, "chunk_length": 3, "trace": True}),
    ([4], {"beam_width": 3, "successors": 2, "chunk_length": 2, "dedup": True, "top_k": 0}),
    ([5, 6], {"top_k": 4, "top_p": 0.8, "beam_width": 2, "successors": 2, "score": "mean"}),
    ([7, 8, 9], {"method": "bon", "successors": 4, "n": 2, "top_k": 0, "top_p": 0.9}),
    ([2], {"method": "sample", "n": 3, "min_p": 0.1, "top_k": 0}),
    ([3, 3], {"temperature": 0.0, "beam_width": 2, "successors": 2, "finished": "replicate"}),
    # A prompt, and then histories, that are long enough to be segments of their own.
    (
        [*range(1, 20), 3],
        {
            "beam_width": 2, "successors": 2, "chunk_length": 9, "max_new_tokens": 12,
            "ignore_eos": True,
        },
    ),
]  # fmt: skip


def results() -> list[Any]:
    """Everything but float rounding: tokens, parents, kept sets, reasons; scores to 3 digits."""
    guides = [
        Guide(tiny_model("llama", seed=10, layers=1), tiny_model("gpt2", seed=20, layers=1)),
        Guide(tiny_model("gpt2", seed=11, layers=1), tiny_model("llama", seed=21, layers=1), 0.5),
    ]
    base = tiny_model("llama", eos=(0, 5))
    # Prompts enter in pieces, and chunks are scored in several passes.
    engine = Engine(base, guides, device="cpu", kv_cache_tokens=2048, max_pass_tokens=24)
    params = [SearchParams(**{"max_new_tokens": 7, "seed": 3, **own}) for _, own in REQUESTS]
    found = engine.generate([prompt for prompt, _ in REQUESTS], params)
    return [
        {
            "hypotheses": [
                [h.token_ids, h.finish_reason, None if h.score is None else round(h.score, 3)]
                for h in result.hypotheses
            ],
            "kept": [r.kept for r in result.trace.rounds] if result.trace else None,
        }
        for result in found
    ]


if __name__ == "__main__":
    json.dump(results(), sys.stdout)
