"""What a rank of several runs; and one process alone, for comparison.

``python -m tests.support.rank_program NAME MODELS FOUND``: what the function of that name finds is
left in FOUND, as JSON, by the number of the rank.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

import w2s_fast.models.memory as memory
from tests.support.foreign_guides import pair
from w2s_fast import AsyncEngine, Engine, Guide, ScoredCandidate, SearchParams
from w2s_fast.errors import RankFailure, W2SFastError
from w2s_fast.models.limits import Memory
from w2s_fast.models.ranks import Ranks
from w2s_fast.result import SearchResult

DEVICE = os.environ.get("RANKS_ON", "cpu")
# "biased": a Llama with biases in all of its linear modules.
FAMILIES = ("llama", "biased", "qwen3", "mistral", "gemma2")
PROMPTS = ("ab", "hello there", "once upon a time there was")
SMALL = SearchParams(max_new_tokens=10, chunk_length=3, beam_width=2, successors=3)

LONG = SearchParams(max_new_tokens=24, chunk_length=2, beam_width=2, successors=2)


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def engine(folder: Path, family: str = "llama", **options: Any) -> Engine:
    options.setdefault("guides", Guide(str(folder / "tuned"), str(folder / "untuned")))
    return Engine(
        str(folder / family),
        dtype="float32" if DEVICE == "cuda" else "float64",
        device=DEVICE,
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


class Unsent(str):
    """A prompt that is a string, and cannot be sent to another process."""

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


def led(folder: Path) -> dict[str, Any]:
    """Rank 0 alone is asked, by many at once and in any order; the other one follows."""
    seen: list[int] = []

    def scorer(candidates: Sequence[ScoredCandidate]) -> list[float]:
        seen.append(len(candidates))
        return [float(sum(c.token_ids) % 7) for c in candidates]

    def choice(values: Sequence[float], candidates: Sequence[ScoredCandidate]) -> list[int]:
        return sorted(range(len(values)), key=lambda i: (-values[i], i))[-2:]

    # One of the base's vocabulary, and one of another.
    guides = [Guide(str(folder / "tuned"), str(folder / "untuned")), pair("bpe-first")]
    own = engine(folder, guides=guides, scorers=[scorer], kv_cache_tokens=512)
    found: dict[str, Any] = {}
    left = None
    if rank() > 0:
        own.follow()
        found["called"] = len(seen)
    else:
        with own.lead():
            if ranks() > 1:
                found["again"] = error_of(lambda: AsyncEngine(own))
                found["weights"] = error_of(own.weights_changed)
            found |= asyncio.run(_asked(own, choice))
            left = own.stream(PROMPTS[1], LONG)
            next(left)
    counts = own.stats()
    found["pools"] = {
        name: [p.used_pages, p.cached_pages, p.cache_hit_tokens] for name, p in counts.pools.items()
    }
    found["counts"] = [counts.rounds, counts.finished, counts.aborted, counts.set_aside]
    if left is not None:
        found["left"] = error_of(lambda: list(left))
    # Behind it all of them are asked again.
    found["after"] = found_in(own.generate(PROMPTS[0], SMALL))
    return found


async def _asked(own: Engine, choice: Any) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    given_up = own.stream(PROMPTS[2], LONG)
    next(given_up)
    asked: list[Callable[[], Any]] = [
        lambda: found_in(own.generate(PROMPTS, several())),
        lambda: found_in(own.generate("chosen", several(selection=choice)[0])),
        lambda: "".join(piece.text for piece in own.stream("streamed", SMALL)),
        lambda: own.score(list(PROMPTS), ["some", "given", "texts"]),
        lambda: own.token_scores(["ab"], ["cd"], model="base"),
        lambda: [list(top) for top in own.log_probs(["hello"], top=2)[0].top[1:] if top],
        lambda: error_of(lambda: own.generate("ab", SearchParams(max_new_tokens=10**6))),
        lambda: found_in(own.generate(Unsent("a text"), SMALL)),
        lambda: found_in(own.generate("stopped", several(stop=["e", "a"], chunk_stop=["o"])[1])),
    ]
    tasks = [loop.run_in_executor(None, one) for one in asked]
    given_up.close()  # while it is under way, with the others
    answers = await asyncio.gather(*tasks)
    return {"answers": list(answers)}


def served(folder: Path) -> dict[str, Any]:
    """The same behind asyncio."""
    own = engine(folder)
    if rank() > 0:
        why = error_of(lambda: AsyncEngine(own))
        own.follow()
        return {"why": why}

    async def ask() -> list[Any]:
        async with AsyncEngine(own) as many:
            tasks = [asyncio.ensure_future(many.generate(p, q)) for p, q in zip(PROMPTS, several())]
            tasks.append(asyncio.ensure_future(many.generate(PROMPTS[0], SMALL)))
            await asyncio.sleep(0.05)
            tasks[-1].cancel()
            pieces = [piece async for piece in many.stream("a stream", SMALL)]
            results = [await task for task in tasks[:-1]]
            return [found_in(results), "".join(piece.text for piece in pieces)]

    return {"found": asyncio.run(ask())}


def led_to_death(folder: Path) -> dict[str, Any]:
    """A rank that follows dies while others are asked for."""
    own = engine(folder)
    if rank() > 0:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        own.follow()

    async def ask() -> dict[str, Any]:
        async with AsyncEngine(own) as many:
            params = SearchParams(max_new_tokens=60, chunk_length=2)
            tasks = [asyncio.ensure_future(_until_error(many, p, params)) for p in PROMPTS]
            errors = await asyncio.gather(*tasks)
            return {"errors": errors, "alive": many.alive, "next": await _until_error(many, "ab")}

    return asyncio.run(ask())


async def _until_error(many: AsyncEngine, prompt: str, params: SearchParams = SMALL) -> str:
    while True:
        try:
            await many.generate(prompt, params)
        except W2SFastError as error:
            return type(error).__name__


def idle(folder: Path) -> dict[str, Any]:
    """Rank 0 has nothing to do for longer than an exchange may take."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    own = engine(folder)
    if rank() > 0:
        own.follow()
        return {}
    with own.lead():
        time.sleep(4)
        return {"found": found_in(own.generate("ab", SMALL))}


def not_followed(folder: Path) -> dict[str, Any]:
    """Rank 0 leads, and the other one goes its own way."""
    own = engine(folder)
    if rank() == 0:
        return {"why": error_of(lambda: own.lead().__enter__())}
    return {"why": error_of(lambda: own.generate("ab", SMALL))}


def adapted(folder: Path) -> dict[str, Any]:
    """The tuned guide is an adapter of the base."""
    guides = Guide(str(folder / "adapter"), str(folder / "llama"))
    return {"why": error_of(lambda: engine(folder, guides=guides))}


def unread(folder: Path) -> dict[str, Any]:
    """Rank 1 cannot read a guide; the other one must not wait for it."""
    guides = Guide(str(folder / "tuned"), str(folder / ("broken" if rank() else "untuned")))
    return {"why": error_of(lambda: engine(folder, guides=guides))}


def apart(folder: Path) -> dict[str, Any]:
    """The ranks ask for different things."""
    own = engine(folder)
    other = SearchParams(max_new_tokens=10, seed=rank())
    return {
        "first": error_of(lambda: own.generate("ab", other)),
        "then": error_of(lambda: own.generate("ab", SMALL)),
        "async": error_of(lambda: AsyncEngine(own)),
        "follow": error_of(own.follow),
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
