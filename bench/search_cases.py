"""What the benchmark of the search runs: models, prompts, variants, and the ratios promised."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from bench.baselines import GuideModels, generate_beams, generate_rows, released_search
from w2s_fast import Engine, Guide, SearchParams

# The variants of a case.
ENGINE = "w2s-fast"
BATCH = "w2s-fast, many requests"
GENERATE = "A: generate"
RELEASED = "B: as released"
EACH = "A: generate, of each model"
BEAMS = "C: generate, beams"

ROWS = 16  # of one request, in every case but that of beams


class Sizes(NamedTuple):
    """Of a GPT-2."""

    layers: int
    width: int
    heads: int
    vocabulary: int


class Ratio(NamedTuple):
    """Seconds a sampled token of variant ``over``, divided by those of variant ``under``."""

    name: str
    over: str
    under: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def met(self, value: float) -> bool:
        if self.at_most is not None:
            return value <= self.at_most
        return self.at_least is not None and value >= self.at_least


@dataclass(frozen=True)
class Case:
    """One setting, the variants that are timed in it, and the ratios between them."""

    name: str
    base: Sizes
    guide: Sizes | None
    prompt_tokens: int
    params: SearchParams
    variants: tuple[str, ...]
    ratios: tuple[Ratio, ...]
    batch: int = 8  # how many requests many are

    @property
    def rows(self) -> int:
        """Of one request."""
        return self.params.beam_width if self.params.method == "beam" else ROWS

    @property
    def shape(self) -> str:
        guide = "no guide" if self.guide is None else f"guides {_shown(self.guide)}"
        new = self.params.max_new_tokens
        return f"base {_shown(self.base)}, {guide}, prompt {self.prompt_tokens}, {new} new tokens"


def cases(quick: bool = False) -> list[Case]:
    """All cases; ``quick``: the same with tiny models and texts."""
    if quick:
        base = same = Sizes(2, 32, 2, 211)
        small = Sizes(1, 16, 1, 211)
    else:
        base = same = Sizes(12, 768, 12, 50_257)
        small = Sizes(4, 256, 4, 50_257)
    tiny = Sizes(1, 32, 2, 211)
    short, long = (8, 16) if quick else (64, 256)
    many, few = (12, 7) if quick else (50, 30)
    search = SearchParams(
        beam_width=4, successors=4, chunk_length=5, max_new_tokens=many, temperature=0.7, top_k=50,
        ignore_eos=True,
    )  # fmt: skip

    def against_both(at_most: float, at_least: float) -> tuple[Ratio, ...]:
        return (
            Ratio("w2s-fast / A", ENGINE, GENERATE, at_most=at_most),
            Ratio("B / w2s-fast", RELEASED, ENGINE, at_least=at_least),
        )

    return [
        Case(
            "small-guides", base, small, short, search,
            (ENGINE, GENERATE, RELEASED), against_both(0.9, 4),
        ),
        Case(
            "same-size-guides", base, same, long,
            dataclasses.replace(search, max_new_tokens=few),
            (ENGINE, GENERATE, RELEASED), against_both(0.95, 16),
        ),
        Case(
            "batch", base, small, short, search, (ENGINE, BATCH),
            (Ratio("tokens/s of 8 requests / of 1", ENGINE, BATCH, at_least=1.8),),
        ),
        Case(  # of models that cost next to nothing: what is left is the search itself
            "many-requests", tiny, tiny, short, search, (ENGINE, BATCH),
            (Ratio("tokens/s of 64 requests / of 1", ENGINE, BATCH, at_least=4),), batch=64,
        ),
        Case(
            "sample", base, None, short,
            dataclasses.replace(search, method="sample", n=ROWS),
            (ENGINE, GENERATE), (Ratio("w2s-fast / A", ENGINE, GENERATE, at_most=0.85),),
        ),
        Case(  # against the sum of what the three models cost by themselves
            "fusion", base, small, short,
            dataclasses.replace(search, method="fusion", n=ROWS),
            (ENGINE, EACH), (Ratio("w2s-fast / A", ENGINE, EACH, at_most=1.0),),
        ),
        *(
            Case(
                name, base, None, prompt,
                dataclasses.replace(search, method="beam", n=search.beam_width),
                (ENGINE, BEAMS), (Ratio("w2s-fast / C", ENGINE, BEAMS, at_most=0.6),),
            )
            for name, prompt in (("beam", short), ("beam-long-prompt", long))
        ),
    ]  # fmt: skip


def random_model(sizes: Sizes, seed: int) -> PreTrainedModel:
    """A GPT-2 in float32 with random weights and no EOS, with transformers' default attention."""
    config = GPT2Config(
        vocab_size=sizes.vocabulary,
        n_layer=sizes.layers,
        n_embd=sizes.width,
        n_head=sizes.heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


class Bench:
    """A case with its models and prompts, ready to run a variant."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.base = random_model(case.base, 0)
        self.guides: list[GuideModels] = []
        if case.guide is not None:
            self.guides = [GuideModels(*(random_model(case.guide, seed) for seed in (1, 2)))]
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(
            case.base.vocabulary, (case.batch, case.prompt_tokens), generator=generator
        )

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine over the same model objects that the baselines run.

        Without the prefix cache: every turn has the same prompts, and the baselines run them anew.
        """
        guides = [Guide(g.tuned, g.untuned, g.weight) for g in self.guides]
        return Engine(self.base, guides, prefix_cache=False)

    def run(self, variant: str, seed: int = 0, new_tokens: int | None = None) -> int:
        """Run a variant once: the tokens sampled, whose number is checked.

        Args:
            new_tokens: of each row, if not as many as the case says.
        """
        new_tokens = new_tokens or self.case.params.max_new_tokens
        params = dataclasses.replace(self.case.params, seed=seed, max_new_tokens=new_tokens)
        prompts = self.prompts[: self.case.batch if variant == BATCH else 1]
        torch.manual_seed(seed)
        if variant == GENERATE:
            sampled = generate_rows(self.base, prompts.expand(ROWS, -1), new_tokens, params).numel()
        elif variant == EACH:
            models = [self.base, *(model for guide in self.guides for model in guide[:2])]
            rows = prompts.expand(ROWS, -1)
            found = [generate_rows(model, rows, new_tokens, params) for model in models]
            sampled = found[0].numel()
        elif variant == BEAMS:
            sampled = generate_beams(self.base, prompts, new_tokens, params).numel()
        elif variant == RELEASED:
            sampled = released_search(
                self.base, self.guides, prompts[0].tolist(), params
            ).sampled_tokens
        else:
            results = self.engine.generate(prompts.tolist(), params)
            sampled = sum(result.usage.sampled_tokens for result in results)
        expected = len(prompts) * self.case.rows * new_tokens
        if sampled != expected:
            raise RuntimeError(f"{variant} sampled {sampled} tokens; promised: {expected}")
        return sampled


def _shown(sizes: Sizes) -> str:
    return f"{sizes.layers} x {sizes.width}"
