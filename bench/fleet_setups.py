"""What a replica is: models on GPUs, how long its rounds take, what its memory holds, its price.

    tokens of a request      P + W * h + W * K * L, in the base and in every model of its guides
    seconds of prompts       sum over models of  t_product(tokens) / share
    seconds of a round       measured where it was; elsewhere the limit of bench/roofline.py / share

for a prompt of P tokens and W hypotheses of h. A share is how much of a limit was reached where it
was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from bench import random_models as shapes
from bench.roofline import Limits, Load, Weights, decode_seconds, product_seconds, score_seconds
from bench.rounds import SETTLED

RESULTS = Path(__file__).parent / "results"
XL_RESULTS = RESULTS / "2026-11-26-NVIDIA-H100-80GB-HBM3-search.json"
EIGHT_RESULTS = RESULTS / "2026-11-26-NVIDIA-H200-search-8B.json"
PROMPT = 512  # tokens of every prompt that was measured
SEVENTY = shapes.llama(80, 8192, 64, 8, 28_672, 128_256)  # of Llama 3.1 70B
_ITEM = 2  # bytes of a number in bfloat16
# Bytes of a GPU: what the H100 said of itself (its smoke.json), and the H200's data sheet.
_H100, _H200 = 85.0e9, 141e9
# Assumed: what weights and pages may take of a GPU; the rest is for activations and recordings.
_FOR_WEIGHTS_AND_PAGES = 0.9
# Assumed: what GPUs that share each layer keep of their rate, for they exchange sums twice a layer.
_TOGETHER = 0.85
_SIZES = (1, 4, 16, 64)  # requests, where rounds come from a formula


@dataclass(frozen=True)
class Model:
    """``held``: parameters in memory, those that are only looked up, too."""

    weights: Weights
    held: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Model:
        """In bfloat16, by the numbers of a GPT-2 or a Llama whose head is a matrix of its own."""
        if isinstance(config, GPT2Config):
            d, n = config.n_embd, config.n_layer
            multiplied = n * (12 * d * d + 13 * d) + 2 * d + config.vocab_size * d
            kv_bytes = 2 * n * d * _ITEM
            return cls(Weights(multiplied, kv_bytes, _ITEM), multiplied + config.n_positions * d)
        assert isinstance(config, LlamaConfig) and not config.tie_word_embeddings
        d, n = config.hidden_size, config.num_hidden_layers
        kv = config.num_key_value_heads * (d // config.num_attention_heads)
        layer = 2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size + 2 * d
        embeddings = config.vocab_size * d
        multiplied = n * layer + d + embeddings
        return cls(Weights(multiplied, 2 * n * kv * _ITEM, _ITEM), multiplied + embeddings)


@dataclass(frozen=True)
class Setup:
    """A replica, and a search in it.

    Attributes:
        chunk, width, successors: L, W, K.
        rounds_ms: milliseconds of a round of all requests, by their number; the largest is how
            many run at once. source: where these come from.
        memory: bytes of all of its GPUs. limits: of all of them together.
        prompt_share: of the rate of products, that passes over prompts reach.
    """

    name: str
    base: Model
    guides: tuple[Model, ...]
    chunk: int
    rounds_ms: Mapping[int, float]
    source: str
    gpu: str
    gpus: int
    memory: float
    limits: Limits
    prompt_share: float
    width: int = 4
    successors: int = 4

    @property
    def models(self) -> tuple[Model, ...]:
        return (self.base, *self.guides)

    @property
    def most(self) -> int:
        """Requests that run at once."""
        return max(self.rounds_ms)

    @property
    def weight_bytes(self) -> int:
        return sum(model.held * model.weights.item_bytes for model in self.models)

    @property
    def kv_bytes(self) -> int:
        """Of a token in all models."""
        return sum(model.weights.kv_bytes for model in self.models)

    def request_tokens(self, prompt: int, history: int) -> int:
        """Tokens that a request holds at most at a time, in each model, before pages round up."""
        return sum(self.request_parts(prompt, history))

    def request_parts(self, prompt: int, history: int) -> tuple[int, int, int]:
        """The same apart: of the prompt, of the hypotheses, of the candidates of a round."""
        return prompt, self.width * history, self.width * self.successors * self.chunk

    @property
    def page_tokens(self) -> int:
        """Tokens that the memory beside the weights holds, in all models at once."""
        room = _FOR_WEIGHTS_AND_PAGES * self.memory - self.weight_bytes
        return max(0, int(room // self.kv_bytes))

    def cache_tokens(self, prompt: int, history: int) -> int:
        """What is left of them for prompts of before, while as many requests run as may."""
        return max(0, self.page_tokens - self.most * self.request_tokens(prompt, history))

    def prompt_seconds(self, tokens: int) -> float:
        """Of a pass over so many tokens of prompts in all models."""
        if not tokens:
            return 0.0
        passes = (product_seconds(model.weights, tokens, self.limits) for model in self.models)
        return sum(passes) / self.prompt_share


def interpolated(table: Mapping[int, float], requests: int) -> float:
    """Between the two numbers of requests beside it, on a straight line.

    Raises:
        ValueError: it lies outside what the table has.
    """
    sizes = sorted(table)
    if not sizes[0] <= requests <= sizes[-1]:
        raise ValueError(f"{requests} requests; known: {sizes[0]} to {sizes[-1]}")
    above = next(size for size in sizes if size >= requests)
    below = max(size for size in sizes if size <= requests)
    if above == below:
        return table[above]
    part = (requests - below) / (above - below)
    return table[below] + part * (table[above] - table[below])


def measured_rows(path: Path, base: str) -> tuple[dict[int, dict[str, Any]], Limits]:
    """Rows of rounds with graphs, by requests, in a report of bench.end_to_end; and its limits."""
    report = json.loads(path.read_text())
    own = [row for row in report["rows"] if row["base"] == base and row["way"] == "graphs"]
    rows = {row["requests"]: row for row in own if not row["error"]}
    return rows, Limits(report["bandwidth"], report["product_rate"])


def limit_ms(
    models: Sequence[Model], load: Load, histories: Sequence[int], limits: Limits
) -> float:
    """What a round takes at least, the base first among the models; mean over the histories."""
    base, *guides = (model.weights for model in models)
    found = [
        decode_seconds(base, load, history, limits) + score_seconds(guides, load, history, limits)
        for history in histories
    ]
    return 1e3 * sum(found) / len(found)


def histories(chunk: int, rounds: int) -> list[int]:
    """Tokens before each of the rounds that bench.end_to_end timed."""
    return [chunk * (SETTLED + i) for i in range(rounds)]


def _scoring_share(
    guides: Sequence[Model], load: Load, rounds: int, scoring_ms: float, limits: Limits
) -> float:
    """Of its limit, that scoring reached: as passes over prompts, it is one of many tokens."""
    weights = [guide.weights for guide in guides]
    before = histories(load.chunk, rounds)
    least = sum(score_seconds(weights, load, history, limits) for history in before) / len(before)
    return 1e3 * least / scoring_ms


def _measured(
    name: str, path: Path, configs: Sequence[PreTrainedConfig], chunk: int, rounds: int, gpu: str
) -> Setup:
    rows, limits = measured_rows(path, name)
    base, *guides = (Model.of(config) for config in configs)
    most = max(rows)
    load = Load(most, PROMPT, chunk=chunk)
    share = _scoring_share(guides, load, rounds, rows[most]["scoring_ms"], limits)
    times = {requests: row["ms"] for requests, row in rows.items()}
    memory = _H100 if gpu == "H100" else _H200
    return Setup(
        name, base, tuple(guides), chunk, times, path.name, gpu, 1, memory, limits, share
    )  # fmt: skip


def gpt2_xl() -> Setup:
    """Under two gpt2, L=5, as measured on one H100."""
    configs = [shapes.GPT2_XL, shapes.GPT2, shapes.GPT2]
    return _measured("gpt2-xl", XL_RESULTS, configs, chunk=5, rounds=10, gpu="H100")


def eight() -> Setup:
    """8B under two of its size, L=30, as measured on one H200."""
    return _measured("8B", EIGHT_RESULTS, [shapes.LARGE] * 3, chunk=30, rounds=3, gpu="H200")


def by_formula(setup: Setup, prompt: int = PROMPT) -> Setup:
    """With rounds of other prompts, and of more requests, at the share of the limit of 8B's.

    Half of the pages at most are for requests, so that some are left for prompts of before.
    """
    rows, _ = measured_rows(EIGHT_RESULTS, "8B")
    share = rows[max(rows)]["of_limit"]
    before = histories(setup.chunk, 3)
    fit = setup.page_tokens // 2 // setup.request_tokens(prompt, before[-1])
    sizes = {size for size in _SIZES if size <= fit} | {max(1, min(fit, max(_SIZES)))}
    times = {
        size: limit_ms(setup.models, Load(size, prompt, chunk=setup.chunk), before, setup.limits)
        / share
        for size in sorted(sizes)
    }
    source = f"by the formula, at {share:.0%} of the limit as in {EIGHT_RESULTS.name}"
    return replace(setup, rounds_ms=times, source=source)


def eight_by_formula(prompt: int = PROMPT) -> Setup:
    return replace(by_formula(eight(), prompt), name="8B, formula")


def seventy(gpus: int = 4) -> Setup:
    """70B under two 8B, L=30, its layers spread over several H200: not measured."""
    one = eight()
    base, guide = Model.of(SEVENTY), one.base
    rate = gpus * _TOGETHER
    limits = Limits(one.limits.bandwidth * rate, one.limits.rate * rate)
    guides, memory = (guide, guide), gpus * _H200
    setup = replace(
        one, name="70B", base=base, guides=guides, gpus=gpus, memory=memory, limits=limits
    )  # fmt: skip
    return by_formula(setup)


def cost_of(tokens: float, tokens_per_s: float, gpus: int, price: float) -> float:
    """Of so many answer tokens, where all of a replica's GPUs cost ``price`` an hour each."""
    return price * gpus / 3600 * tokens / tokens_per_s
