"""What a rank of several runs; and one process alone, for comparison.

``python -m tests.support.rank_program NAME MODELS FOUND``: what the function of that name finds is
left in FOUND, as JSON, by the number of the rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import w2s_fast.models.memory as memory
from w2s_fast import AsyncEngine, Engine, Guide, ScoredCandidate, SearchParams
from w2s_fast.errors import RankFailure, W2SFastError
from w2s_fast.models.limits import Memory
from w2s_fast.models.ranks import Ranks
from w2s_fast.result import SearchResult

# "biased": a Llama with biases in all of its linear modules.
FAMILIES = ("llama", "biased", "qwen3", "mistral", "gemma2")
PROMPTS = ("ab", "hello there", "once upon a time there was")
SMALL = SearchParams(max_new_tokens=10, chunk_length=3, beam_width=2, successors=3)


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def engine(folder: Path, family: str = "llama", **options: Any) -> Engine:
    options.setdefault("guides", Guide(str(folder / "tuned"), str(folder / "untuned")))
    return Engine(
        str(folder / family),
        dtype="float64",
        device="cpu",
        tensor_parallel=ranks(),
        **{"kv_cache_tokens": 2048, **options},
    )


def found_in(results: Sequence[SearchResult]) -> list[Any]:
    return [[[h.token_ids, h.score] for h in result.hypotheses] for result in results]


def several(**fields: Any) -> list[SearchParams]:
    known = {**SMALL.__dict__, **fields}
    return [SearchParams(**{**known, "seed": seed}) for seed in range(len(PROMPTS))]


def families(folder: Path) -> dict[str, Any]:
    """Searches of several requests at once over each family."""
    found = {}
    for family in FAMILIES:
        own = engine(folder, family)
        results = own.generate(PROMPTS, several())
        found[family] = {
            "searches": found_in(results),
            "heads": own.base.pool.kv.shape[-2],
            "heads_of_guide": own.guides[0].models[0].pool.kv.shape[-2],
            "log_probs": own.log_probs(["hello"])[0].logprobs[1:],
        }
    return found


def methods(folder: Path) -> dict[str, Any]:
    """All else that an engine does, over one model."""
    own = engine(folder)
    found: dict[str, Any] = {
        "sample": found_in(own.generate(PROMPTS, several(method="sample", n=2))),
        "bon": found_in(own.generate(PROMPTS, several(method="bon"))),
        "beam": found_in(own.generate(PROMPTS, several(method="beam", chunk_length=None))),
        "fusion": found_in(own.generate(PROMPTS, several(method="fusion"))),
    }
    pieces = list(own.stream(PROMPTS[1], SMALL))
    found["stream"] = [pieces[-1].result.token_ids if pieces[-1].result else None]
    found["streamed"] = "".join(piece.text for piece in pieces)
    before = own.stats().pools[own.base.name].cache_hit_tokens
    prompt = "a prompt of more than one page of tokens, that comes a second time"
    found["first"] = found_in(own.generate(prompt, SMALL))
    found["again"] = found_in(own.generate(prompt, SMALL))
    found["hits"] = own.stats().pools[own.base.name].cache_hit_tokens - before
    found["score"] = own.score(list(PROMPTS), ["some", "given", "texts"])

    def scorer(candidates: Sequence[ScoredCandidate]) -> list[float]:
        """Another one on another rank."""
        return [(1 - 2 * rank()) * float(sum(c.token_ids) % 7) for c in candidates]

    scored = engine(folder, scorers=[scorer])
    found["scorers"] = found_in(scored.generate(PROMPTS, several()))
    # The base as its own guide, and with little memory: requests are set aside.
    contrast = Guide(str(folder / "llama"), str(folder / "untuned"), prompt_template="{prompt}!")
    tight = engine(folder, guides=contrast, kv_cache_tokens=256)
    found["contrast"] = found_in(tight.generate(PROMPTS, several()))
    found["set aside"] = tight.stats().set_aside
    return found


def measured(folder: Path) -> dict[str, Any]:
    """Sizes that follow from memory, which is another one on each rank."""
    size = 2**22 * (3 - rank())
    memory.main_memory = lambda: Memory(size, size, None)
    given, least = [], Ranks.least
    Ranks.least = lambda self, own: (given.append(own[0]), least(self, own))[1]  # type: ignore
    own = engine(folder, kv_cache_tokens=None)
    return {"tokens": given[2], "room": own.base.pool.num_pages * own.base.pool.page_size}


def killed(folder: Path) -> dict[str, Any]:
    """Rank 1 dies in the middle of a run."""
    own = engine(folder)
    completed = own.as_completed([*PROMPTS, *PROMPTS], SearchParams(max_new_tokens=60), at_once=6)
    streams = own.stream(PROMPTS[0], SearchParams(max_new_tokens=60, chunk_length=2))
    next(streams)
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    errors = [type(result.error).__name__ for _, result in completed]
    return {"errors": errors, "next": error_of(lambda: own.generate("ab", SMALL))}


def apart(folder: Path) -> dict[str, Any]:
    """The ranks ask for different things."""
    own = engine(folder)
    other = SearchParams(max_new_tokens=10, seed=rank())
    return {
        "first": error_of(lambda: own.generate("ab", other)),
        "then": error_of(lambda: own.generate("ab", SMALL)),
        "async": error_of(lambda: AsyncEngine(own)),
        "score": error_of(lambda: own.score(["ab"], ["c"])),
    }


def interrupted(folder: Path) -> dict[str, Any]:
    """On rank 1 something goes wrong within a step; it lives on, and the others must not wait."""
    own = engine(folder)
    if rank() == 1:
        own.base.backend.make = no_memory  # type: ignore[method-assign]
    first = error_of(lambda: own.generate("ab", SMALL))
    return {"first": first, "then": error_of(lambda: own.generate("ab", SMALL))}


def no_memory(*_: Any) -> Any:
    raise MemoryError("there is none left")


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except RankFailure as error:
        return f"RankFailure: {error}"
    except W2SFastError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main() -> None:
    name, folder, found = sys.argv[1:]
    Path(found, f"{rank()}.json").write_text(json.dumps(globals()[name](Path(folder))))


if __name__ == "__main__":
    main()
